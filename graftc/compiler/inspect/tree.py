"""Build the source model's module tree with all additions; identical layers are shown once and counted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from graftc.compiler.inspect.snapshot import Snapshot, TensorRecord
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.weights.names import parsed
from graftc.records.graphs import layers_title
from graftc.records.places import AdaptedPlace
from graftc.records.tree import Addition, TreeNode, TreeTensor
from graftc.specs.errors.text import format_runs


def _rows(node: TreeNode, depth: int) -> Iterator[tuple[str, str, str, str]]:
    if depth == 0:
        yield "module", "base", "trained", "roles and tensors"
    times = f"{node.alike} x " if node.alike > 1 else ""
    base, trained = (f"{times}{n:,}" if n else "" for n in (node.base_parameters, node.trainable_parameters))
    roles = f"[{', '.join(node.roles)}] " if node.roles else ""
    yield "  " * depth + node.name, base, trained, roles + ", ".join(map(str, node.tensors))
    for addition in node.added:
        yield "", "", "", str(addition)
    for child in node.children:
        yield from _rows(child, depth + 1)


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
    """Return a Compilation's module tree, omitting modules that have no tensors and are not adapted."""
    root = _Module()
    for name, record in snapshot.base.items():
        path, _, last = name.rpartition(".")
        root.at(path).tensors.append(_tensor(last, record))
    for name, owner in snapshot.aliases.items():
        path, _, last = name.rpartition(".")
        if owner in snapshot.base:
            root.at(path).tensors.append(_tensor(last, snapshot.base[owner], owner))
    rows = {record.tensor: format_runs(record.rows) for record in snapshot.trained if record.rows is not None}
    for name, record in snapshot.adapters.items():
        own = parsed(name)
        assert own is not None
        tensors = root.at(own.module).added.setdefault(own.adaptation, [])
        tensors.append(_tensor(own.part, record, rows=rows.get(name, "")))
    for site in snapshot.sites:
        module = root.at(site.module)
        module.added.setdefault(site.adaptation, [])
        module.roles |= dict.fromkeys(_role(site))
    methods = snapshot.spec.owners | {TRAIN: TRAIN}
    return _node(snapshot.model, "", root, methods)


def _tensor(name: str, record: TensorRecord, tied: str | None = None, rows: str = "") -> TreeTensor:
    return TreeTensor(name, record.dtype, record.shape, record.trainable, record.parameter, tied, rows)


def _role(site: AdaptedPlace) -> Iterator[str]:
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
    added = (Addition(owner, methods.get(owner, owner), tuple(parts)) for owner, parts in module.added.items())
    node = TreeNode(
        name=name,
        paths=(path,),
        roles=tuple(module.roles),
        tensors=tuple(module.tensors),
        added=tuple(added),
        children=titled,
        base_parameters=sum(t.numel for t in module.tensors if t.tied is None and t.parameter)
        + sum(child.base_parameters * child.alike for child in titled),
        trainable_parameters=sum(t.numel for t in tensors if t.trainable)
        + sum(child.trainable_parameters * child.alike for child in titled),
    )
    if path and not name.isdigit() and len(titled) == 1 and not (node.tensors or node.added or node.roles):
        return replace(titled[0], name=f"{name}.{titled[0].name}")
    return node


def _titled(node: TreeNode, parent: str) -> TreeNode:
    if node.alike == 1:
        return node
    return replace(
        node, name=layers_title(node.paths).removeprefix(f"{parent}.") if parent else layers_title(node.paths)
    )


def _alike(node: TreeNode) -> tuple[Any, ...]:
    """Return a key that is equal for identical layers: everything except the names of the layers themselves."""
    own = tuple(node.name.split(".")[1:]), node.alike, node.roles, node.tensors, node.added
    return (*own, tuple((child.name.split(".")[0], _alike(child)) for child in node.children))
