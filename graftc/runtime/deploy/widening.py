"""The same compiled model over a base in a wider element type, so that a merge loses none of the update to rounding."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.fingerprint import identify
from graftc.compiler.folding.certificate import Certificate
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.runtime.model.runner import runner_of
from graftc.specs.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled, CompiledRunner

NARROW = (torch.bfloat16, torch.float16)
"""What can be widened, to float32."""


def widened(compiled: Compiled | CompiledRunner, dtype: torch.dtype | None) -> CompiledRunner:
    """The compiled model with every 16-bit tensor in ``dtype``: the base's values are the same, to the bit.

    The graphs are captured anew, of a copy of the source model. Where ``dtype`` is None or the model's own, this is the
    model itself.

    Raises:
        GraftError: GC073 for what is no dtype, and for one that is not wider than the model's.
    """
    runner: CompiledRunner = runner_of(compiled)
    if dtype is None or dtype == runner.dtype:
        return runner
    if not isinstance(dtype, torch.dtype):
        raise GraftError("GC073", f"the dtype is {kind_of(dtype)}", hint="give torch.float32, or None for the base's")
    if dtype is not torch.float32 or runner.dtype not in NARROW:
        own, wanted = (str(each).removeprefix("torch.") for each in (runner.dtype, dtype))
        message = f"a base in {own} cannot be merged in {wanted}: only 16 bits can be widened, to float32"
        hint = "merge in the base's own dtype and cast the result: casting rounds what no adaptation changes as well"
        raise GraftError("GC073", message, hint=hint)
    compilation = runner.compilation
    values = {name: _wide(tensor, dtype) for name, tensor in adapter_values(compilation.store)}
    made: CompiledRunner = runner_of(runner.sibling(compilation.spec, values, _copy(compilation.source, dtype)))
    return made


def of_the_base(certificate: Certificate, wide: CompiledRunner, compiled: Compiled | CompiledRunner) -> Certificate:
    """The certificate of a model that may have been widened, with the fingerprint of the base that it came from."""
    runner: CompiledRunner = runner_of(compiled)
    if wide is runner:
        return certificate
    compilation = runner.compilation
    note = f"the base is in {str(runner.dtype).removeprefix('torch.')}"
    fingerprint = identify(compilation.source, replaced=compilation.replaced).fingerprint
    return replace(certificate, fingerprint=fingerprint, notes=(*certificate.notes, note))


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype) if tensor.dtype in NARROW else tensor.detach()


def _copy(source: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model; it shares the tensors that are wide enough, and ties are kept."""
    memo: dict[int, Any] = {}
    for tensor in (*source.parameters(), *source.buffers()):
        wide: Tensor = tensor if tensor.dtype not in NARROW else _wide(tensor, dtype)
        if isinstance(tensor, nn.Parameter) and wide is not tensor:
            wide = nn.Parameter(wide, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = wide
    made = copy.deepcopy(source, memo)
    for module in made.modules():
        config = getattr(module, "config", None)
        if getattr(config, "dtype", None) in NARROW:
            config.dtype = dtype  # type: ignore[union-attr]
    return made
