"""Reference readers of quantised checkpoints, without graftc's code.

Dense weights follow the formulas of the libraries that write the formats. Whole models are loaded by transformers, if
it
does not need those libraries.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from graftc.passes.core.packing.modules import packed_weights
from graftc.passes.core.packing.packed_tensor import dense

Parts: TypeAlias = Mapping[str, Tensor]
"""The tensors of one weight in a file, by the last part of their names."""

_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def codes_in(words: Tensor, bits: int, count: int) -> Tensor:
    """Read codes along the last axis of 32-bit words, as a stream of bits."""
    raw = numpy.ascontiguousarray(words.to(torch.int32).numpy()).view(numpy.uint8)
    stream = numpy.unpackbits(raw, axis=-1, bitorder="little")[..., : count * bits]
    each = stream.reshape(*stream.shape[:-1], count, bits).astype(numpy.int64)
    return torch.from_numpy(each @ (1 << numpy.arange(bits)))


def _gptq(parts: Parts, options: Mapping[str, Any]) -> Tensor:
    bits, scales = options["bits"], parts["scales"]
    rows = scales.shape[1]
    width = parts["qweight"].shape[0] * 32 // bits
    less_one = (options.get("checkpoint_format") or options.get("format") or "gptq") == "gptq"
    zeros = (codes_in(parts["qzeros"], bits, rows) + int(less_one)) & (2**bits - 1)
    index = parts["g_idx"].long() if "g_idx" in parts else torch.arange(width) // (width // len(scales))
    return (scales[index] * (codes_in(parts["qweight"].T, bits, width).T - zeros[index])).T


def _awq(parts: Parts, options: Mapping[str, Any]) -> Tensor:
    scales = parts["scales"]
    rows, each = scales.shape[1], len(parts["qweight"]) // len(scales)
    groups = (codes_in(parts[name], 4, rows).unflatten(1, (-1, 8)) for name in ("qweight", "qzeros"))
    codes, zeros = (eights[..., _AWQ_PLACES].flatten(1) for eights in groups)
    return ((codes - zeros.repeat_interleave(each, 0)).to(scales.dtype) * scales.repeat_interleave(each, 0)).T


def _fp8(parts: Parts, options: Mapping[str, Any]) -> Tensor:
    scales = parts["weight_scale_inv"] if "weight_scale_inv" in parts else parts["weight_scale"]
    weight: Tensor = Fp8Dequantize(None)._dequantize_one(parts["weight"], scales.reshape(scales.shape or (1, 1)))
    return weight


def _compressed(parts: Parts, options: Mapping[str, Any]) -> Tensor:
    scales = parts["weight_scale"]
    scales = scales if scales.dim() == 2 else scales.reshape(-1, 1)
    if "weight_packed" not in parts:
        zeros = parts.get("weight_zero_point", torch.zeros(1, 1, dtype=torch.int8)).to(scales.dtype)
        each = parts["weight"].shape[1] // scales.shape[1]
        wide = scales.repeat_interleave(each, 1)
        return (parts["weight"].to(scales.dtype) - zeros) * wide
    rows, width = parts["weight_shape"].tolist()
    bits = max(b for b in range(1, 9) if -(-width * b // 32) == parts["weight_packed"].shape[1])
    codes = codes_in(parts["weight_packed"], bits, width) - 2 ** (bits - 1)
    zeros = torch.zeros_like(scales)
    if "weight_zero_point" in parts:
        zeros = (codes_in(parts["weight_zero_point"].T, bits, rows).T - 2 ** (bits - 1)).to(scales.dtype)
    index = torch.arange(width) // (width // scales.shape[1])
    if "weight_g_idx" in parts and not bool((parts["weight_g_idx"] == -1).all()):
        index = parts["weight_g_idx"].long()
    return (codes.to(scales.dtype) - zeros[:, index]) * scales[:, index]


def _hqq(parts: Parts, options: Mapping[str, Any]) -> Tensor:
    kind = bytes(parts["packing"].tolist()).decode()
    made_in = getattr(torch, bytes(parts["compute_dtype"].tolist()).decode().removeprefix("torch."))
    bits = int(kind[0])
    raw = parts["W_q"].contiguous().view(torch.uint8).long()
    codes = torch.cat([(raw // 2**shift) % 2**bits for shift in range(8 - bits, -1, -bits)])
    scale, zero = (parts[name].to(made_in) for name in ("scale", "zero"))
    return ((codes.to(made_in) - zero) * scale).reshape(parts["shape"].tolist())


def _bitsandbytes(parts: Parts, options: Mapping[str, Any]) -> Tensor:
    import bitsandbytes.functional as library

    weight: Tensor
    if "SCB" in parts:
        weight = library.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    else:
        state = {name: tensor for name, tensor in parts.items() if name.startswith("weight.")}
        kept = library.QuantState.from_dict(state, device=torch.device("cpu"))
        weight = library.dequantize_4bit(parts["weight"], kept)
    return weight


READERS: Mapping[str, tuple[str, Callable[[Parts, Mapping[str, Any]], Tensor]]] = {
    "gptq": ("qweight", _gptq),
    "awq": ("qweight", _awq),
    "fp8": ("weight", _fp8),
    "mxfp8": ("weight", _fp8),
    "compressed-tensors": ("weight", _compressed),
    "hqq": ("W_q", _hqq),
    "bitsandbytes": ("weight", _bitsandbytes),
}
"""By ``quant_method``: the part that has a weight's codes, and what the parts mean together."""

BY_TRANSFORMERS = ("fp8", "mxfp8", "bitsandbytes")
"""Formats that transformers loads on this machine."""


def method_of(folder: Path) -> str:
    """Return the ``quant_method`` that the config of a folder states."""
    options = json.loads((folder / "config.json").read_text())["quantization_config"]
    four_or_eight = options.get("load_in_4bit") or options.get("load_in_8bit")
    return "bitsandbytes" if four_or_eight else str(options["quant_method"])


def require_values(folder: Path, model: Any) -> Any:
    """Check that a model's weights are, bit for bit, those that the files of its folder mean.

    The values follow the formulas above, and those of transformers if it loads the format. Return the model with the
    same
    weights and none of graftc's code.
    """
    mine = {name: dense(weight) for name, weight in packed_weights(model).items()}
    method, stored = method_of(folder), load_file(folder / "model.safetensors")
    options = json.loads((folder / "config.json").read_text())["quantization_config"]
    part, reader = READERS[method]
    expected: dict[str, Tensor] = {}
    for name in mine:
        module = name.removesuffix("weight")
        expected[name] = reader({n.removeprefix(module): t for n, t in stored.items() if n.startswith(module)}, options)
    left = {f"{n.removesuffix(part)}weight": t for n, t in stored.items() if n.endswith(f".{part}")}
    left = {n: t for n, t in left.items() if not t.is_floating_point() or t.itemsize == 1}
    assert left.keys() <= mine.keys(), left.keys() - mine.keys()
    theirs = by_transformers(folder) if method in BY_TRANSFORMERS else None
    if theirs is not None:
        loaded = weights_of_bitsandbytes(theirs) if method == "bitsandbytes" else theirs.state_dict()
        expected |= {name: loaded[name] for name in mine.keys() & loaded.keys()}
    for name, weight in mine.items():
        equal(weight, expected[name], name)
    reference = plain(folder, stored, mine)
    parameters = {n: p for n, p in model.named_parameters() if n not in mine and p.is_floating_point()}
    state = reference.state_dict()
    for name in parameters.keys() & state.keys():
        equal(parameters[name], state[name], name)
    return reference


def equal(mine: Tensor, wanted: Tensor, name: str) -> None:
    """Check that two tensors have the same values, with NaN in the same places."""
    wanted = wanted.to(mine.dtype)
    assert mine.shape == wanted.shape, f"{name}: {list(mine.shape)}, not {list(wanted.shape)}"
    same = (mine == wanted) | (mine.isnan() & wanted.isnan())
    assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} differ"


def by_transformers(folder: Path) -> Any:
    """Return the model of a folder as transformers loads it, or None if it refuses to."""
    import transformers

    with torch.random.fork_rng(devices=()):
        try:
            return transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu").eval()
        except Exception:  # it refuses the options, and only the formulas are compared
            return None


def weights_of_bitsandbytes(model: Any) -> dict[str, Tensor]:
    """Return dense weights by name, computed by the library's own functions."""
    import bitsandbytes as bnb

    weights: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            if getattr(weight, "quant_state", None) is None:  # transformers left codes there that it cannot run
                continue
            weights[f"{path}.weight"] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            weights[f"{path}.weight"] = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return weights


def plain(folder: Path, stored: Parts, weights: Parts) -> Any:
    """Return the model of a folder without quantisation, with these weights in place of the quantised ones."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(config).to(next(iter(weights.values())).dtype)
    state = {name: stored[name] for name in model.state_dict() if name in stored and name not in weights}
    missing = model.load_state_dict({**state, **weights}, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing
    return model.eval()
