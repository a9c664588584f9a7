"""The source model's module tree with what was added to it; layers that are alike are shown once and counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftc.compiler.inspect.diff import title
from graftc.compiler.inspect.snapshot import SiteRecord, Snapshot, TensorRecord
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.roles.findings import format_runs
from graftc.passes.core.weights.names import parsed
from graftc.specs.errors.markup import Html, bullets, folded, joined, tag


@dataclass(frozen=True)
class TreeTensor:
    """A tensor of a module, or one that an adaptation has there.

    Attributes:
        name: within its module, or within the adaptation.
        record: its type.
        tied: the name that owns it; None where this one does.
        rows: the rows of the base tensor that it stands in for, as text; empty for all, and for what is not a copy.
    """

    name: str
    record: TensorRecord
    tied: str | None = None
    rows: str = ""

    def __str__(self) -> str:
        if self.tied is not None:
            return f"{self.name} = {self.tied}"
        mark = "*" if self.record.trainable else ""
        notes = [f"rows {self.rows}"] if self.rows else []
        notes += [] if self.record.parameter else ["buffer"]
        return f"{self.name}{mark} {self.record}" + (f" ({', '.join(notes)})" if notes else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "dtype": self.record.dtype,
            "shape": list(self.record.shape),
            "trainable": self.record.trainable,
            "parameter": self.record.parameter,
            "tied": self.tied,
            "rows": self.rows,
        }


@dataclass(frozen=True)
class Addition:
    """What one adaptation has in a module.

    Attributes:
        adaptation, method: whose.
        tensors: its tensors there; none where several places share them.
    """

    adaptation: str
    method: str
    tensors: tuple[TreeTensor, ...]

    def __str__(self) -> str:
        whose = self.adaptation if self.adaptation == self.method else f"{self.adaptation} ({self.method})"
        tensors = ", ".join(map(str, self.tensors)) or "no tensors of its own here"
        return f"+ {whose}: {tensors}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "adaptation": self.adaptation,
            "method": self.method,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


@dataclass(frozen=True)
class TreeNode:
    """A module, or several layers that are alike.

    Attributes:
        name: below its parent; the class of the model for the root. Paths without a branch are one name.
        paths: its path, or those of the layers.
        roles: roles of what is adapted in the module itself, with rows where those are not all.
        tensors: the module's own base tensors.
        added: what adaptations have in the module itself.
        children: modules below it, for the first of the layers.
        base_parameters: elements of base parameters in it and below, in one of the layers; tied ones at their owner.
        trainable_parameters: elements that were added there and train, in one of the layers.
    """

    name: str
    paths: tuple[str, ...]
    roles: tuple[str, ...]
    tensors: tuple[TreeTensor, ...]
    added: tuple[Addition, ...]
    children: tuple[TreeNode, ...]
    base_parameters: int
    trainable_parameters: int

    @property
    def alike(self) -> int:
        """How many layers this stands for."""
        return len(self.paths)

    def lines(self) -> list[str]:
        """The tree as aligned lines: module, base and trained parameters, roles and tensors."""
        rows = list(self._rows(0))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = []
        for name, base, trained, details in rows:
            numbers = f"{base.rjust(widths[1])}  {trained.rjust(widths[2])}"
            lines.append(f"{name.ljust(widths[0])}  {numbers}  {details}".rstrip())
        return lines

    def text(self) -> str:
        """`lines` under a header, with a legend where something trains."""
        legend = ["", "* trains"] if self.trainable_parameters else []
        return "\n".join([*self.lines(), *legend]) + "\n"

    def __str__(self) -> str:
        return self.text()

    def _rows(self, depth: int) -> Iterator[tuple[str, str, str, str]]:
        if depth == 0:
            yield "module", "base", "trained", "roles and tensors"
        times = f"{self.alike} x " if self.alike > 1 else ""
        base, trained = (f"{times}{n:,}" if n else "" for n in (self.base_parameters, self.trainable_parameters))
        roles = f"[{', '.join(self.roles)}] " if self.roles else ""
        yield "  " * depth + self.name, base, trained, roles + ", ".join(map(str, self.tensors))
        for addition in self.added:
            yield "", "", "", str(addition)
        for child in self.children:
            yield from child._rows(depth + 1)

    def _repr_html_(self) -> str:
        """For notebooks: the tree, every module with what is in it folded."""
        times = f"{self.alike} x " if self.alike > 1 else ""
        base, trained = f"{times}{self.base_parameters:,}", f"{times}{self.trainable_parameters:,}"
        counts = [f"{base} base"] if self.base_parameters else []
        counts += [tag("b", f"{trained} trained")] if self.trainable_parameters else []
        roles = [f"[{', '.join(self.roles)}]"] if self.roles else []
        line = joined([tag("code", self.name), *roles, joined(counts, ", ")], " ")
        held = bullets([*map(str, self.tensors), *map(str, self.added)])
        return folded(line, Html(held + "".join(child._repr_html_() for child in self.children)))

    def to_json(self) -> dict[str, Any]:
        """Plain values, children within."""
        return {
            "name": self.name,
            "paths": list(self.paths),
            "alike": self.alike,
            "roles": list(self.roles),
            "base_parameters": self.base_parameters,
            "trainable_parameters": self.trainable_parameters,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "added": [addition.to_json() for addition in self.added],
            "children": [child.to_json() for child in self.children],
        }


@dataclass
class _Module:
    """A module while the tree is made."""

    tensors: list[TreeTensor] = field(default_factory=list)
    roles: dict[str, None] = field(default_factory=dict)
    added: dict[str, list[TreeTensor]] = field(default_factory=dict)
    children: dict[str, _Module] = field(default_factory=dict)

    def at(self, path: str) -> _Module:
        """The module at a path below this one, made where there is none."""
        module = self
        for segment in path.split(".") if path else ():
            module = module.children.setdefault(segment, _Module())
        return module


def model_tree(snapshot: Snapshot) -> TreeNode:
    """The module tree of a Compilation. Modules that hold no tensor and are not adapted are left out."""
    root = _Module()
    for name, record in snapshot.base.items():
        path, _, last = name.rpartition(".")
        root.at(path).tensors.append(TreeTensor(last, record))
    for name, owner in snapshot.aliases.items():
        path, _, last = name.rpartition(".")
        if owner in snapshot.base:
            root.at(path).tensors.append(TreeTensor(last, snapshot.base[owner], owner))
    rows = {record.tensor: format_runs(record.rows) for record in snapshot.trained if record.rows is not None}
    for name, record in snapshot.adapters.items():
        own = parsed(name)
        assert own is not None
        held = root.at(own.module).added.setdefault(own.adaptation, [])
        held.append(TreeTensor(own.part, record, rows=rows.get(name, "")))
    for site in snapshot.sites:
        module = root.at(site.key.module)
        module.added.setdefault(site.adaptation, [])
        module.roles |= dict.fromkeys(_role(site))
    methods = snapshot.spec.owners | {TRAIN: TRAIN}
    return _node(snapshot.model, "", root, methods)


def _role(site: SiteRecord) -> Iterator[str]:
    for role in site.roles[:1]:
        yield role if site.rows is None else f"{role} rows {format_runs(site.rows)}"


def _node(name: str, path: str, module: _Module, methods: Mapping[str, str]) -> TreeNode:
    children: list[TreeNode] = []
    groups: dict[Any, int] = {}
    for segment, child in module.children.items():
        node = _node(segment, f"{path}.{segment}" if path else segment, child, methods)
        key = _alike(node) if segment.isdigit() else node.paths
        if key in groups:
            first = children[groups[key]]
            children[groups[key]] = replace(first, paths=(*first.paths, *node.paths))
        else:
            groups[key] = len(children)
            children.append(node)
    found = tuple(_titled(child, path) for child in children)
    tensors = [tensor for held in module.added.values() for tensor in held]
    node = TreeNode(
        name,
        (path,),
        tuple(module.roles),
        tuple(module.tensors),
        tuple(Addition(owner, methods.get(owner, owner), tuple(held)) for owner, held in module.added.items()),
        found,
        sum(t.record.numel for t in module.tensors if t.tied is None and t.record.parameter)
        + sum(child.base_parameters * child.alike for child in found),
        sum(t.record.numel for t in tensors if t.record.trainable)
        + sum(child.trainable_parameters * child.alike for child in found),
    )
    if path and not name.isdigit() and len(found) == 1 and not (node.tensors or node.added or node.roles):
        return replace(found[0], name=f"{name}.{found[0].name}")
    return node


def _titled(node: TreeNode, parent: str) -> TreeNode:
    if node.alike == 1:
        return node
    return replace(node, name=title(node.paths).removeprefix(f"{parent}.") if parent else title(node.paths))


def _alike(node: TreeNode) -> tuple[Any, ...]:
    """What is the same in layers that are alike: all but the names of the layers themselves."""
    own = tuple(node.name.split(".")[1:]), node.alike, node.roles, node.tensors, node.added
    return (*own, tuple((child.name.split(".")[0], _alike(child)) for child in node.children))
