"""The pipeline: from a model and a spec to verified Programs over one Store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from graftc.compiler.capture.cache import Known
from graftc.compiler.capture.identity.capture_key import walked_once
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.preparing import Prepared, explained, prepare
from graftc.compiler.signatures import add_first
from graftc.compiler.source_watch import SourceWatch
from graftc.passes.core.build.initial import Initial
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
    """

    seed: int = 0
    use_cache: bool = True
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    known: Known = field(default_factory=dict, repr=False)
    every_layer: bool = False


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
    prepared = prepare(Prepared(spec, model, model, axes, flags, start.use_cache, start.known))
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
    )
    originals = {name: tensor.detach() for name, tensor in prepared.unpacked.items() if name in store.packed}
    initial = Initial(start.seed, start.values, originals, compilation.narrow)
    try:
        add_first(compilation, axes, flags, initial)
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
