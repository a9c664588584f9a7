"""Convert the library-quantised modules of a source model to plain modules with packed weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import torch
from torch import nn

from graftc.compat.modules import parameters_of
from graftc.compiler.missing_weights import same_fresh
from graftc.compiler.quantised_sources import bitsandbytes, torchao
from graftc.compiler.resolve.untie import sharing_copy
from graftc.specs.errors.diagnostics import GraftError, warn

Converter: TypeAlias = Callable[[str, Any, torch.dtype], nn.Module]
"""Returns a plain module that replaces a quantised one, given its path, the module itself, and the weights' dtype."""

_READ_HERE = ("auto_gptq", "gptqmodel", "awq", "hqq", "compressed_tensors")
"""Packages whose modules come from folders that graftc reads itself."""

_UNKNOWN = ("aqlm", "eetq", "fbgemm_gpu", "flute", "fp_quant", "quanto", "optimum", "spqr_quant", "vptq")

_OF_MODELS = ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method")
"""Attributes that transformers sets on a model that it has quantised."""


def arrived(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose quantised modules are replaced with plain ones that contain the library's codes.

    Everything else is shared. The model itself is returned if no library has quantised anything in it.

    Weight values are bit-identical to the library's own dequantisation: nothing is quantised a second time.

    Args:
        model: the model as transformers loads it, which is not changed.

    Raises:
        GraftError: GC162 for a module or tensor that cannot be converted.
    """
    converters = ((path, module, _converter(path, module)) for path, module in model.named_modules())
    quantised = {path: (module, convert) for path, module, convert in converters if convert is not None}
    if not quantised:
        return model
    rounded = [
        p for p, (m, convert) in quantised.items() if convert is bitsandbytes.linear_8bit or torchao.rounds_inputs(m)
    ]
    if rounded:
        message = f"the library that quantised {rounded[0]} also rounds the inputs of linear maps"
        warn("GC164", f"{message}; graftc does not round them")
    dtype = _element_type(model, {id(module) for module, _ in quantised.values()})
    instead: dict[int, Any] = {
        id(module): convert(path, module, dtype) for path, (module, convert) in quantised.items()
    }
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        instead[id(quantizer)] = None
    result: nn.Module = sharing_copy(model, instead)
    for module in result.modules():
        for name in _OF_MODELS:
            module.__dict__.pop(name, None)
    return same_fresh(model, result)


def _converter(path: str, module: nn.Module) -> Converter | None:
    """Return the converter of a module that a library has quantised; None for any other module.

    Raises:
        GraftError: GC162 for a module or tensor that cannot be converted.
    """
    for cls in type(module).__mro__:
        package = cls.__module__.partition(".")[0]
        if package == "bitsandbytes":
            return bitsandbytes.converter(path, module)
        if package in (*_READ_HERE, *_UNKNOWN):
            raise _refused(path, f"a {type(module).__name__} of {package}", read_here=package in _READ_HERE)
    kinds = {type(tensor) for tensor in parameters_of(module).values() if tensor is not None}
    packages = {cls.__module__.partition(".")[0]: cls.__name__ for kind in kinds for cls in reversed(kind.__mro__)}
    if "torchao" in packages:
        return torchao.converter(path, module)
    unknown = next((package for package in packages if package in _UNKNOWN), None)
    if unknown is not None:
        raise _refused(path, f"a {packages[unknown]} of {unknown}", read_here=False)
    return None


def _refused(path: str, what: str, *, read_here: bool) -> GraftError:
    if read_here:
        hint = "load it with graftc.load_base(folder), which reads the folder's tensors itself"
    else:
        hint = "use the model's unquantised checkpoint, and quantise it in the spec: base: {quantize: nf4}"
    return GraftError("GC162", f"{path} is {what}, whose codes graftc does not know", hint=hint)


def _element_type(model: nn.Module, without: Collection[int]) -> torch.dtype:
    """Return the dtype of most floating-point values in parameters outside these modules; float32 if there are none."""
    count: Counter[torch.dtype] = Counter()
    for module in model.modules():
        if id(module) in without:
            continue
        for tensor in parameters_of(module).values():
            if tensor is not None and tensor.is_floating_point():
                count[tensor.dtype] += tensor.numel()
    return max(count, key=lambda dtype: count[dtype], default=torch.float32)
