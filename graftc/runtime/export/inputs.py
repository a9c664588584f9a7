"""Adaptations as inputs of an exported graph: their tensors and the tensors' names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from graftc.compat.modules import parameters_of, transient_of
from graftc.compiler.inspect.snapshot import adapter_tensors
from graftc.passes.core.ir.program import Program
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.store import Store
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.specs.errors.diagnostics import GraftError, unknown_name

ADAPTER_TENSORS = "adapter_tensors"
"""The keyword argument with which a ``.pt2`` program receives adaptations' tensors, by their full names."""


def require_known(runner: ModelRunner | ModelRoot, names: Iterable[str]) -> None:
    """Raise unless every name belongs to an adaptation or composition.

    Raises:
        GraftError: GC091, which suggests the nearest names.
    """
    runner = runner_of(runner)
    tensors = [pair for pair in adapter_tensors(runner.store) if owner_of(pair[0])]
    known = list(dict.fromkeys([*runner.compilation.spec.owners, *(owner_of(name) for name, _ in tensors)]))
    for name in names:
        if name not in known:
            raise unknown_name("adaptation", name, known)


def tensors_of(runner: ModelRunner, program: Program, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return the adaptations' tensors that a Program reads, by adaptation and full name; names are sorted.

    Adaptations without such tensors are left out.

    Args:
        runner: the Runner that has the adaptations.
        program: the Program to export.
        names: names of the adaptations.
    """
    read = {str(node.target) for node in program.graph.find_nodes(op="get_attr")}
    kept = {name: tensor for name, tensor in adapter_tensors(runner.store) if name in read and owner_of(name)}
    own = {name: {fqn: kept[fqn].detach() for fqn in sorted(kept) if owner_of(fqn) == name} for name in names}
    return {name: tensors for name, tensors in own.items() if tensors}


def require_read(runner: ModelRunner, programs: Iterable[Program], names: Iterable[str]) -> None:
    """Raise unless some of the Programs to export reads tensors of every adaptation.

    Raises:
        GraftError: GC065.
    """
    nodes = [node for program in programs for node in program.graph.find_nodes(op="get_attr")]
    read = list(dict.fromkeys(owner for node in nodes if (owner := owner_of(str(node.target)))))
    for name in names:
        if name not in read:
            raise GraftError(
                "GC065",
                f"{name!r} cannot be an input: the exported graph reads none of its tensors",
                hint=_hint(runner, name, read),
            )


def _hint(runner: ModelRunner, name: str, others: Sequence[str]) -> str:
    if name in getattr(runner, "folded", ()):
        return "it has been folded into the weights: export the compiled model, with --no-merge on the command line"
    return f"the graph reads tensors of: {', '.join(others)}" if others else "leave it out of the inputs"


def without(root: Store, program: Program, names: Iterable[str], constants: Mapping[str, Tensor]) -> Store:
    """Return a Store with the tensors that a Program reads, except those that are inputs.

    Args:
        root: the Store that holds the tensors.
        program: the Program that reads them.
        names: names of the tensors that are inputs.
        constants: tensors that the Program reads in addition to those in ``root``, by name.
    """
    store, taken = Store(), set(names)
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in store or name in taken:
            continue
        if name in constants:
            store.add_buffer(name, constants[name], persistent=True)
            continue
        path, _, last = name.rpartition(".")
        owner, tensor = root.owner(path), root.get(name)
        if last in parameters_of(owner):
            parameters_of(store.container(path))[last] = parameters_of(owner)[last]
        else:
            persistent = last not in transient_of(owner)
            store.add_buffer(name, tensor, persistent=persistent)
    return store
