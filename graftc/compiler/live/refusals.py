"""Refuse adaptations that need the whole model as one graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import get_origin

from graftc.compiler.compilation import Compilation
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.method.steering import OutputObjective
from graftc.passes.core.sites.site_slices import slices_of
from graftc.specs.compose import Bank, Gate, Parallel, Split
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place


def refuse_whole(spec: Spec, name: str) -> None:
    """Raise if a part of a spec acts on the model as a whole.

    Args:
        spec: the spec to check.
        name: name of the model's class.

    Raises:
        GraftError: GC149 naming the first such part.
    """
    for path, what in _of_the_whole(spec):
        message = f"{name} is taken apart into its layers, but {what} apply to a whole call"
        raise GraftError("GC149", message, place=Place(path=path), hint="adapt layers and maps instead")


def _of_the_whole(spec: Spec) -> Iterator[tuple[str, str]]:
    for index, adaptation in enumerate(spec.adapt):
        method, path = method_for(adaptation.method), f"adapt[{index}].method"
        if adaptation.virtual_tokens():
            yield path, "virtual tokens"
        if getattr(adaptation, "positions", "") == "shifted":  # the model's own Python counts them, between graphs
            yield f"adapt[{index}].positions", "shifted positions"
        objective = get_origin(method.objective) or method.objective
        if objective is not None and issubclass(objective, OutputObjective) and objective.wanted(adaptation):
            yield path, "objectives that compare several passes"
    by_rows = any(isinstance(composition, Bank | Parallel | Split | Gate) for composition in spec.compose)
    others = (
        (by_rows, "compose", "rows that choose among adaptations"),
        (spec.cloze is not None, "cloze", "blanks"),
        (bool(spec.base.quantize and spec.layer_replication), "base.quantize", "packed weights of replicated layers"),
    )
    yield from ((path, what) for is_there, path, what in others if is_there)


def refuse_read(compilation: Compilation, names: Iterable[str]) -> None:
    """Raise if the model's own Python code reads an adapted tensor between graphs, where it gets the base's values.

    Args:
        compilation: the Compilation of a model that is taken apart.
        names: names of the parameters that are read between graphs.

    Raises:
        GraftError: GC149 naming the first of them that is adapted.
    """
    store, adapted = compilation.store, adapted_tensors(compilation)
    weight_of = store.weight_of
    read = {store.canonical(weight_of.get(name, name)) for name in names}
    for name in sorted(read & adapted.keys()):
        message = f"{adapted[name][-1]!r} adapts {name}, which the model's own Python code also reads between graphs"
        raise GraftError("GC149", message, hint="leave it out, or let the model call the module instead")


def adapted_tensors(compilation: Compilation) -> dict[str, tuple[str, ...]]:
    """Return the names of the adaptations that adapt each tensor of the Store, by the tensor's name.

    An adaptation with tensor edits adapts the tensors named in the edits; any other adapts all tensors of its sites.
    """
    owners: dict[str, dict[str, None]] = defaultdict(dict)
    edits = compilation.tensor_edits
    for edit in edits:
        owners[edit.own.tensor][edit.owner] = None
    editing = {edit.owner for edit in edits}
    for resolved in compilation.main.resolved:
        for site, _ in () if resolved.name in editing else resolved.places:
            for own in slices_of(site, compilation.store):
                owners[own.tensor][resolved.name] = None
    return {tensor: tuple(names) for tensor, names in owners.items()}
