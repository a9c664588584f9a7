"""The pipeline: from a model and a spec to verified Programs over one Store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from graftc.compiler.capture.cache import Known
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
    """What a compilation starts from beside a spec and a model.

    Attributes:
        seed: initial values are drawn from it.
        use_cache: look up and keep the captured graph in the user's cache folder.
        values: adapter tensors to start from instead of initial values, by name.
        known: captures to use instead of capturing, by their key.
        every_layer: write every layer out from the beginning, for who looks at graphs and runs none.
        level: how much of the model is one graph; by default as much as can be.
        because: why that is not all of it.
        shown: what is done with a model to see how it calls its layers, where it is taken apart: see `Prepared`.
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
        spec: what to adapt.
        model: any module that torch.export captures.
        axes: its inputs; the model's usual ones by default.
        flags: other keyword arguments of its calls.
        start: its seed, and what is there already.

    Raises:
        GraftError: with a code for whatever is wrong with the spec, the model or their fit.
    """
    if any(name == CALLS for name, _ in flags):  # those of a Compilation that there has been
        start = replace(start, level="layers")
    try:
        return _compiled(spec, model, axes, flags, start)
    except GraftError as error:
        asked = start.level is not None or spec.capture == "graph"
        if asked or error.code not in _NO_GRAPH or not _has_values(model):
            raise
        whole = error
    # Not while that error is handled: it would be the context of every other one, which says why a trace has failed.
    try:
        return _compiled(spec, model, axes, flags, replace(start, level="layers", because=_why(whole)))
    except GraftError as error:
        if error.code == "GC030" and spec.capture != "layers":
            details = (*whole.details, f"taken apart: {error.message}")
            raise GraftError(whole.code, whole.message, hint=whole.hint, details=details) from error
        raise


def _has_values(model: nn.Module) -> bool:
    """Whether a model can be run."""
    return all(tensor.device.type != "meta" for tensor in (*model.parameters(), *model.buffers()))


def _why(refused: GraftError) -> str:
    """The reason for which a model is no graph, without what it was called with."""
    return told(refused.__cause__ or refused)


_NO_GRAPH = ("GC030", "GC041")
"""What is said of a model that cannot be one graph."""


def _compiled(
    spec: Spec, model: nn.Module, axes: Sequence[Axis] | None, flags: Flags, start: StartingPoint
) -> Compilation:
    """A Compilation of a model at one level."""
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
        if prepared.level != "graph":  # no graph shows what is written between graphs
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
    """A Compilation of another spec for the same first signature.

    Args:
        compilation: has the signature, the seed and the captures.
        spec: what to adapt there.
        values: adapter tensors to start from, by name.
        model: another base; by default the one that ``compilation`` was given.
        axes: inputs of other element types, where the base is of another one.
    """
    return compile_model(
        spec,
        compilation.source if model is None else model,
        compilation.main.axes if axes is None else axes,
        flags=compilation.flags,
        start=StartingPoint(compilation.seed, compilation.use_cache, values, compilation.captures()),
    )
