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
        name: name within its module or adaptation.
        record: its type.
        tied: the name that owns the tensor; None if this one does.
        rows: the rows of the base tensor that it replaces, as text; empty for all of them, and for tensors that are not
            copies.
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
        """Return the tensor as plain values."""
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
    """The tensors that one adaptation has in a module.

    Attributes:
        adaptation, method: name and method of the adaptation.
        tensors: its tensors there; none if several places share them.
    """

    adaptation: str
    method: str
    tensors: tuple[TreeTensor, ...]

    def __str__(self) -> str:
        whose = self.adaptation if self.adaptation == self.method else f"{self.adaptation} ({self.method})"
        tensors = ", ".join(map(str, self.tensors)) or "no tensors of its own here"
        return f"+ {whose}: {tensors}"

    def to_json(self) -> dict[str, Any]:
        """Return the addition as plain values."""
        return {
            "adaptation": self.adaptation,
            "method": self.method,
            "tensors": [tensor.to_json() for tensor in self.tensors],
        }


@dataclass(frozen=True)
class TreeNode:
    """A module, or several layers that are alike.

    Attributes:
        name: name below its parent; the class of the model for the root. Paths without a branch are one name.
        paths: path of the module, or those of the layers.
        roles: roles of the sites in the module itself, with rows if those are not all.
        tensors: base tensors of the module itself.
        added: what adaptations have in the module itself.
        children: modules below it, for the first of the layers.
        base_parameters: number of elements of base parameters in it and below, for one of the layers; tied ones are
            counted at their owner.
        trainable_parameters: number of added elements that train in it and below, for one of the layers.
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
        """The number of layers that this node represents."""
        return len(self.paths)

    def lines(self) -> list[str]:
        """Return the tree as aligned lines: module, base and trained parameters, roles and tensors."""
        rows = list(self._rows(0))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = []
        for name, base, trained, details in rows:
            numbers = f"{base.rjust(widths[1])}  {trained.rjust(widths[2])}"
            lines.append(f"{name.ljust(widths[0])}  {numbers}  {details}".rstrip())
        return lines

    def text(self) -> str:
        """Return the `lines` as one text, with a legend if anything trains."""
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
        """Return HTML for notebooks: the tree, with the contents of every module collapsed."""
        times = f"{self.alike} x " if self.alike > 1 else ""
        base, trained = f"{times}{self.base_parameters:,}", f"{times}{self.trainable_parameters:,}"
        counts = [f"{base} base"] if self.base_parameters else []
        counts += [tag("b", f"{trained} trained")] if self.trainable_parameters else []
        roles = [f"[{', '.join(self.roles)}]"] if self.roles else []
        line = joined([tag("code", self.name), *roles, joined(counts, ", ")], " ")
        contents = bullets([*map(str, self.tensors), *map(str, self.added)])
        return folded(line, Html(contents + "".join(child._repr_html_() for child in self.children)))

    def to_json(self) -> dict[str, Any]:
        """Return the node as plain values, including its children."""
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
    """A module while the tree is being built."""

    tensors: list[TreeTensor] = field(default_factory=list)
    roles: dict[str, None] = field(default_factory=dict)
    added: dict[str, list[TreeTensor]] = field(default_factory=dict)
    children: dict[str, _Module] = field(default_factory=dict)

    def at(self, path: str) -> _Module:
        """Return the module at a path below this one, creating it if necessary."""
        module = self
        for segment in path.split(".") if path else ():
            module = module.children.setdefault(segment, _Module())
        return module


def model_tree(snapshot: Snapshot) -> TreeNode:
    """Return the module tree of a Compilation, without modules that hold no tensor and are not adapted."""
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
        tensors = root.at(own.module).added.setdefault(own.adaptation, [])
        tensors.append(TreeTensor(own.part, record, rows=rows.get(name, "")))
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
    titled = tuple(_titled(child, path) for child in children)
    tensors = [tensor for parts in module.added.values() for tensor in parts]
    node = TreeNode(
        name,
        (path,),
        tuple(module.roles),
        tuple(module.tensors),
        tuple(Addition(owner, methods.get(owner, owner), tuple(parts)) for owner, parts in module.added.items()),
        titled,
        sum(t.record.numel for t in module.tensors if t.tied is None and t.record.parameter)
        + sum(child.base_parameters * child.alike for child in titled),
        sum(t.record.numel for t in tensors if t.record.trainable)
        + sum(child.trainable_parameters * child.alike for child in titled),
    )
    if path and not name.isdigit() and len(titled) == 1 and not (node.tensors or node.added or node.roles):
        return replace(titled[0], name=f"{name}.{titled[0].name}")
    return node


def _titled(node: TreeNode, parent: str) -> TreeNode:
    if node.alike == 1:
        return node
    return replace(node, name=title(node.paths).removeprefix(f"{parent}.") if parent else title(node.paths))


def _alike(node: TreeNode) -> tuple[Any, ...]:
    """Return what layers that are alike have in common: everything except the names of the layers themselves."""
    own = tuple(node.name.split(".")[1:]), node.alike, node.roles, node.tensors, node.added
    return (*own, tuple((child.name.split(".")[0], _alike(child)) for child in node.children))
