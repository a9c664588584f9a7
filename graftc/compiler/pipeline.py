"""The pipeline that compiles a model and a spec into verified Programs over one Store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from graftc.compiler.capture.identity.capture_key import walked_once
from graftc.compiler.capture.interface import Flags, has_values
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.refusals import told
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.refusals import refuse_read
from graftc.compiler.preparing import Prepared, explained, prepare
from graftc.compiler.preparing import StartingPoint as StartingPoint
from graftc.compiler.signatures import add_first
from graftc.compiler.source_watch import SourceWatch
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.elements.calls import CALLS
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError


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
        spec: the document that specifies what to adapt.
        model: any module that torch.export can capture.
        axes: the model's inputs; by default, its default inputs.
        flags: other keyword arguments that the model is called with.
        start: the seed, and existing captures and values.

    Raises:
        GraftError: with a code for any problem with the spec, the model or their combination.
    """
    if any(name == CALLS for name, _ in flags):  # such flags come from an earlier Compilation
        start = replace(start, level="layers")
    try:
        return _compiled(spec, model, axes, flags, start)
    except GraftError as error:
        if start.level is not None or spec.capture == "graph" or error.code not in _NO_GRAPH or not has_values(model):
            raise
        graph_error = error
    # Outside the handler, since the error would become the context of later errors, which are searched for causes.
    try:
        reason = told(graph_error.__cause__ or graph_error)  # without the inputs that the model was called with
        return _compiled(spec, model, axes, flags, replace(start, level="layers", because=reason))
    except GraftError as error:
        if error.code == "GC030" and spec.capture != "layers":
            details = (*graph_error.details, f"taken apart: {error.message}")
            raise GraftError(graph_error.code, graph_error.message, hint=graph_error.hint, details=details) from error
        raise


_NO_GRAPH = ("GC030", "GC041")
"""Error codes for a model that cannot be captured as one graph."""


def _compiled(
    spec: Spec, model: nn.Module, axes: Sequence[Axis] | None, flags: Flags, start: StartingPoint
) -> Compilation:
    """Compile a model at one level."""
    prepared = prepare(Prepared(spec, model, model, axes, flags, start))
    store = Store.mirror(prepared.model)
    compilation = Compilation(
        spec,
        prepared.model,
        store,
        prepared.source,
        SourceWatch(prepared.source),
        start.seed,
        start.use_cache,
        prepared.start.known,
        every_layer=start.every_layer,
        whole=prepared.whole,
        in_the_way=prepared.in_the_way,
        codes_chosen_before=start.requantised,
    )
    originals = {name: tensor.detach() for name, tensor in prepared.unpacked.items() if name in store.packed}
    initial = Initial(start.seed, start.values, originals, compilation.narrow, start.requantised)
    try:
        if start.takes_apart:  # no graph shows the writes between graphs
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
    """Compile another spec for a Compilation's first signature.

    Args:
        compilation: the Compilation that provides the signature, the seed and the captures.
        spec: the document that specifies what to adapt.
        values: adapter tensors to start from, by name.
        model: another base; by default, the base of ``compilation``.
        axes: inputs with other dtypes, if the new base's dtype differs.
    """
    return compile_model(
        spec,
        compilation.source if model is None else model,
        compilation.main.axes if axes is None else axes,
        flags=compilation.flags,
        start=StartingPoint(
            compilation.seed,
            compilation.use_cache,
            values,
            compilation.captures(),
            requantised=compilation.requantised,
        ),
    )
