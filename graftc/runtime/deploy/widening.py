"""Recompile a model over a base in a wider dtype, so that a merge loses none of the update to rounding."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from graftc.compiler.folding.requantise import BaseForm
from graftc.compiler.folding.rounding import NARROW
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.packing.modules import hold_values
from graftc.passes.core.weights.source_lock import source_lock
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.options.base import BaseOptions


def widened(runner: AdaptedRunner, dtype: torch.dtype | None, base: BaseForm | None = None) -> AdaptedRunner:
    """Return the compiled model with every 16-bit tensor in ``dtype``; the base's values stay exactly the same.

    The graphs are captured again, from a copy of the source model in which packed weights are stored as values. If
    ``dtype`` is None or the model's own, the model itself is returned.

    Raises:
        GraftError: GC073 for a value that is not a dtype, for a dtype that is not wider than the model's, or if weights
            are to be packed again, which requires their own dtype.
    """
    if dtype is None or dtype == runner.dtype:
        return runner
    if not isinstance(dtype, torch.dtype):
        raise GraftError("GC073", f"dtype must be a torch dtype, got {kind_of(dtype)}", hint="pass torch.float32")
    if dtype is not torch.float32 or runner.dtype not in NARROW:
        own, wanted = (str(each).removeprefix("torch.") for each in (runner.dtype, dtype))
        message = f"a base in {own} cannot be merged in {wanted}: only 16-bit dtypes can be widened, to float32"
        hint = "merge in the base's own dtype and cast the result: casting also rounds what no adaptation changes"
        raise GraftError("GC073", message, hint=hint)
    compilation, spec = runner.compilation, runner.compilation.spec
    if base == "requantized":
        raise GraftError("GC073", "packed weights keep their dtype", hint='leave dtype out, or pass base="full"')
    values = {name: _wide(tensor, dtype) for name, tensor in adapter_values(compilation.store)}
    axes = [replace(axis, dtype=dtype) if axis.dtype in NARROW else axis for axis in compilation.main.axes]
    wide: AdaptedRunner = runner.sibling(unquantised(spec), values, _copy(compilation.source, dtype), axes)._graftc
    return wide


def unquantised(spec: Spec) -> Spec:
    """Return the spec for a base whose values are in full precision."""
    return spec.model_copy(update={"base": BaseOptions()})


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.dtype in NARROW else tensor.detach()


def _copy(source: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a widened copy of a model, which shares tensors that are already wide enough; tied tensors stay tied."""
    instead: dict[int, Tensor] = {}
    with source_lock():
        for tensor in (*source.parameters(), *source.buffers()):
            wide: Tensor = tensor if tensor.dtype not in NARROW else _wide(tensor, dtype)
            if isinstance(tensor, nn.Parameter) and wide is not tensor:
                wide = nn.Parameter(wide, requires_grad=tensor.requires_grad)
            instead[id(tensor)] = wide
        wide_model: nn.Module = sharing_copy(source, instead)
    for module in wide_model.modules():
        hold_values(module, dtype)
        config = getattr(module, "config", None)
        if getattr(config, "dtype", None) in NARROW:
            config.dtype = dtype  # type: ignore[union-attr]
    return wide_model
