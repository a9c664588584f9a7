"""The pipeline: from a model and a spec to verified Programs over one Store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from graftc.compiler.capture.capture_cache import Known
from graftc.compiler.capture.identity.capture_key import walked_once
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.refusals import told
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.refusals import refuse_read
from graftc.compiler.preparing import Level, Prepared, explained, prepare
from graftc.compiler.signatures import add_first
from graftc.compiler.source_watch import SourceWatch
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.elements.calls import CALLS
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True)
class StartingPoint:
    """Inputs of a compilation in addition to the spec and the model.

    Attributes:
        seed: the seed that initial values are drawn from.
        use_cache: whether to look up and keep the captured graph in the user's cache folder.
        values: adapter tensors to start from instead of initial values, by name.
        known: captures to use instead of capturing, by their key.
        every_layer: whether to write every layer out from the beginning, for callers that inspect graphs and run none.
        level: how much of the model is one graph; by default as much as possible.
        because: the reason why it is not all of it.
        shown: called with a model that is taken apart to see how it calls its layers; see `Prepared`.
    """

    seed: int = 0
    use_cache: bool = True
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    known: Known = field(default_factory=dict, repr=False)
    every_layer: bool = False
    level: Level | None = None
    because: str = ""
    shown: Callable[[nn.Module], Any] | None = None


@exclusive()
@walked_once()
def compile_model(
    spec: Spec,
    model: nn.Module,
    axes: Sequence[Axis] | None = None,
    *,
    flags: Flags = (),
    start: StartingPoint = StartingPoint(),
) -> Compilation:
    """Compile a spec against a model. The model is never changed.

    Args:
        spec: the document that says what to adapt.
        model: any module that torch.export captures.
        axes: its inputs; the model's usual ones by default.
        flags: other keyword arguments of its calls.
        start: the seed, and what exists already.

    Raises:
        GraftError: with a code for anything that is wrong with the spec, the model or their fit.
    """
    if any(name == CALLS for name, _ in flags):  # they come from an earlier Compilation
        start = replace(start, level="layers")
    try:
        return _compiled(spec, model, axes, flags, start)
    except GraftError as error:
        asked = start.level is not None or spec.capture == "graph"
        if asked or error.code not in _NO_GRAPH or not _has_values(model):
            raise
        graph_error = error
    # Not in the handler: that error would become the context of later ones, which says why a trace has failed.
    try:
        return _compiled(spec, model, axes, flags, replace(start, level="layers", because=_why(graph_error)))
    except GraftError as error:
        if error.code == "GC030" and spec.capture != "layers":
            details = (*graph_error.details, f"taken apart: {error.message}")
            raise GraftError(graph_error.code, graph_error.message, hint=graph_error.hint, details=details) from error
        raise


def _has_values(model: nn.Module) -> bool:
    """Return whether a model can be run."""
    return all(tensor.device.type != "meta" for tensor in (*model.parameters(), *model.buffers()))


def _why(refused: GraftError) -> str:
    """Return the reason why a model is not one graph, without the inputs that it was called with."""
    return told(refused.__cause__ or refused)


_NO_GRAPH = ("GC030", "GC041")
"""What is said of a model that cannot be one graph."""


def _compiled(
    spec: Spec, model: nn.Module, axes: Sequence[Axis] | None, flags: Flags, start: StartingPoint
) -> Compilation:
    """Compile a model at one level."""
    asked = Prepared(spec, model, model, axes, flags, start.use_cache, start.known)
    prepared = prepare(replace(asked, level=start.level or "graph", because=start.because, shown=start.shown))
    store = Store.mirror(prepared.model)
    compilation = Compilation(
        spec,
        prepared.model,
        store,
        prepared.source,
        SourceWatch(prepared.source),
        start.seed,
        start.use_cache,
        prepared.known,
        every_layer=start.every_layer,
        in_the_way=prepared.in_the_way,
    )
    originals = {name: tensor.detach() for name, tensor in prepared.unpacked.items() if name in store.packed}
    initial = Initial(start.seed, start.values, originals, compilation.narrow)
    try:
        if prepared.level != "graph":  # no graph shows the writes between graphs
            for name in (*prepared.written, *(n for n in start.values if n in store and store.is_buffer(n))):
                store.own(name, start.values.get(name))
        add_first(compilation, prepared.axes, prepared.flags, initial, prepared.notes)
        if prepared.read:
            refuse_read(compilation, prepared.read)
    except GraftError as error:
        reason = explained(error, prepared)
        if reason is error:
            raise
        raise reason from error
    return compilation


def recompile(
    compilation: Compilation,
    spec: Spec,
    values: Mapping[str, Tensor],
    model: nn.Module | None = None,
    axes: Sequence[Axis] | None = None,
) -> Compilation:
    """Compile another spec for the same first signature.

    Args:
        compilation: the Compilation with the signature, the seed and the captures.
        spec: the document that says what to adapt there.
        values: adapter tensors to start from, by name.
        model: another base; by default the one that ``compilation`` was given.
        axes: inputs of other element types, if the base has another one.
    """
    return compile_model(
        spec,
        compilation.source if model is None else model,
        compilation.main.axes if axes is None else axes,
        flags=compilation.flags,
        start=StartingPoint(compilation.seed, compilation.use_cache, values, compilation.captures()),
    )
