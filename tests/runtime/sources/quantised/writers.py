"""Writers of a tiny Llama in the formats of quantised checkpoints, and the dense weights that the files mean.

Files follow the definitions of the formats, and dense weights the formulas of the libraries, not graftc's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Stored: TypeAlias = tuple[dict[str, Tensor], Tensor]
"""Tensors by the last part of their names, and the dense weight."""

Writer: TypeAlias = Callable[[Tensor], Stored]

GROUP = 32
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def llama(dtype: torch.dtype = torch.float16, inner: int = 96) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def write(folder: Path, model: Any, writer: Writer, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Save a model with its linear maps quantised, and return the dense weights by name."""
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": dict(options)}))
    state, dense = dict(model.state_dict()), {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            stored, dense[f"{path}.weight"] = writer(state.pop(f"{path}.weight"))
            state |= {f"{path}.{name}": tensor for name, tensor in stored.items()}
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return dense


def words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the first axis into words, bit by bit, without the shifts that a reader would use."""
    every = [(codes.to(torch.int64) >> bit) & 1 for bit in range(bits)]
    stream = torch.stack(every, dim=1).flatten(0, 1)
    stream = torch.nn.functional.pad(stream, (0, 0, 0, -len(stream) % 32))
    values = (stream.unflatten(0, (-1, 32)) << torch.arange(32)[:, None]).sum(1)
    return torch.where(values < 2**31, values, values - 2**32).to(torch.int32)


def gptq(bits: int, *, order: bool = False, symmetric: bool = False, less_one: bool = True) -> Writer:
    """Return a writer for GPTQModel's ``dequantize_weight``: ``scales[g_idx] * (codes - zeros[g_idx])``."""

    def writer(weight: Tensor) -> Stored:
        rows, width = weight.shape
        index = torch.arange(width) // GROUP
        index = index[torch.randperm(width)] if order else index
        most = 2**bits
        codes, scales = torch.randint(0, most, (width, rows)), (torch.rand(width // GROUP, rows) * 0.01 + 0.001).half()
        zeros = torch.randint(1 if less_one else 0, most, scales.shape)
        zeros = torch.full_like(zeros, most // 2) if symmetric else zeros
        stored = {
            "qweight": words(codes, bits),
            "qzeros": words((zeros - int(less_one)).T, bits).T,
            "scales": scales,
            "g_idx": index.to(torch.int32),
        }
        return stored, (scales[index] * (codes - zeros[index])).T

    return writer


def awq(weight: Tensor) -> Stored:
    """Pack codes as AutoAWQ's ``WQLinear_GEMM.from_linear`` does, and unpack them as its ``dequantize_gemm`` does."""
    rows, width = weight.shape
    codes, zeros = torch.randint(0, 16, (width, rows)), torch.randint(0, 16, (width // GROUP, rows))
    scales = (torch.rand(width // GROUP, rows) * 0.01 + 0.001).half()

    def packed(values: Tensor) -> Tensor:
        eights = values.unflatten(1, (-1, 8))
        return words(torch.stack([eights[..., place] for place in _AWQ_ORDER], -1).flatten(1).T, 4).T

    dense = (codes - zeros.repeat_interleave(GROUP, 0)).half() * scales.repeat_interleave(GROUP, 0)
    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, dense.T


def fp8(rows: int, group: int, dtype: torch.dtype) -> Writer:
    """Return a writer for transformers' ``Fp8Dequantize``; scales of ``uint8`` are exponents."""

    def writer(weight: Tensor) -> Stored:
        shape = weight.shape[0] // rows, weight.shape[1] // group
        codes = (weight.float() * 2000).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.randint(100, 120, shape, dtype=torch.uint8)
        if dtype != torch.uint8:
            scales = (torch.rand(shape) * 1e-3 + 1e-4).to(dtype)
        dense: Tensor = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
        return {"weight": codes, "weight_scale_inv": scales}, dense

    return writer


def one_scale(weight: Tensor) -> Stored:
    codes, scale = (weight.float() * 2000).clamp(-448, 448).to(torch.float8_e4m3fn), torch.tensor(3e-4)
    return {"weight": codes, "weight_scale_inv": scale}, (codes.float() * scale).bfloat16()


def packed_words(bits: int, *, symmetric: bool, grouped: bool = True, order: bool = False) -> Writer:
    """Return a writer for compressed-tensors' ``pack-quantized``: signed codes and zero points, stored from 0."""

    def writer(weight: Tensor) -> Stored:
        rows, width = weight.shape
        count, half = (width // GROUP if grouped else 1), 2 ** (bits - 1)
        codes, zeros = torch.randint(-half, half, (rows, width)), torch.randint(-half, half, (rows, count))
        scales = (torch.rand(rows, count) * 0.01 + 0.001).bfloat16()
        stored = {
            "weight_packed": words((codes + half).T, bits).T,
            "weight_scale": scales,
            "weight_shape": torch.tensor([rows, width]),
        }
        index = torch.arange(width) // (width // count)
        if order:
            index = index[torch.randperm(width)]
            stored["weight_g_idx"] = index.to(torch.int32)
        if symmetric:
            zeros.zero_()
        else:
            stored["weight_zero_point"] = words(zeros + half, bits)
        return stored, (codes.bfloat16() - zeros.bfloat16()[:, index]) * scales[:, index]

    return writer


def scaled_bytes(dtype: torch.dtype) -> Writer:
    """Return a writer for compressed-tensors' ``int-quantized`` and ``float-quantized``, with a scale for each row."""

    def writer(weight: Tensor) -> Stored:
        codes = (weight.float() * 2000).clamp(-127, 127).to(dtype)
        scales = (torch.rand(len(weight), 1) * 1e-3 + 1e-4).bfloat16()
        return {"weight": codes, "weight_scale": scales}, codes.bfloat16() * scales

    return writer


def hqq(bits: int, axis: int, dtype: torch.dtype, group: int = 16) -> Writer:
    """Return a writer for HQQ's ``Quantizer.dequantize``, with the packing entries of ``HQQLinear.state_dict``."""

    def writer(weight: Tensor) -> Stored:
        rows, width = weight.shape
        count = rows * width // group
        codes = torch.randint(0, 2**bits, (count, group) if axis else (group, count))
        shape = (count, 1) if axis else (1, count)
        scale, zero = (torch.rand(shape) * 0.01).to(dtype), (torch.rand(shape) * 2**bits).to(dtype)
        parts = codes.chunk(8 // bits)
        stored = {
            "W_q": sum(part << (8 - bits * (place + 1)) for place, part in enumerate(parts)).to(torch.uint8),  # type: ignore
            "scale": scale,
            "zero": zero,
            "shape": torch.tensor([rows, width]),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(group, dtype=torch.int32),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "packing": _letters(f"{bits}bit_u8"),
            "compute_dtype": _letters(str(dtype)),
            "quant_zero": torch.tensor(0, dtype=torch.uint8),
            "quant_scale": torch.tensor(0, dtype=torch.uint8),
        }
        return stored, ((codes.to(dtype) - zero) * scale).reshape(rows, width)

    return writer


def _letters(word: str) -> Tensor:
    return torch.tensor([ord(letter) for letter in word], dtype=torch.uint8)


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


def _gptq(bits: int, layout: str = "gptq") -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": layout}


_FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_HQQ = {"quant_method": "hqq", "quant_config": {}}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
F16, BF16 = torch.float16, torch.bfloat16

FORMATS: dict[str, tuple[torch.dtype, Writer, dict[str, Any]]] = {
    "gptq 4": (F16, gptq(4), _gptq(4)),
    "gptq 4 symmetric": (F16, gptq(4, symmetric=True), _gptq(4)),
    "gptq 4 by activations": (F16, gptq(4, order=True), _gptq(4)),
    "gptq 4 zero points as they are": (F16, gptq(4, less_one=False), _gptq(4, "gptq_v2")),
    "gptq 8 symmetric": (F16, gptq(8, symmetric=True), _gptq(8)),
    "gptq 8 by activations": (F16, gptq(8, order=True), _gptq(8)),
    "gptq 3": (F16, gptq(3), _gptq(3)),
    "gptq 2": (F16, gptq(2), _gptq(2)),
    "awq": (F16, awq, _AWQ),
    "fp8 blocks": (BF16, fp8(32, 32, torch.float32), {**_FP8, "weight_block_size": [32, 32]}),
    "fp8 blocks of bfloat16": (BF16, fp8(16, 32, BF16), {**_FP8, "weight_block_size": [16, 32]}),
    "fp8 one scale": (BF16, one_scale, _FP8),
    "mxfp8": (BF16, fp8(1, 32, torch.uint8), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "compressed 4": (BF16, packed_words(4, symmetric=True), _compressed("pack-quantized", num_bits=4)),
    "compressed 4 asymmetric": (BF16, packed_words(4, symmetric=False), _compressed("pack-quantized", num_bits=4)),
    "compressed 4 by activations": (
        BF16,
        packed_words(4, symmetric=True, order=True),
        _compressed("pack-quantized", num_bits=4),
    ),
    "compressed 8 rows": (BF16, packed_words(8, symmetric=False, grouped=False), _compressed("pack-quantized")),
    "compressed 6": (BF16, packed_words(6, symmetric=False), _compressed("pack-quantized", num_bits=6)),
    "compressed int8": (BF16, scaled_bytes(torch.int8), _compressed("int-quantized")),
    "compressed fp8": (BF16, scaled_bytes(torch.float8_e4m3fn), _compressed("float-quantized")),
    "hqq 4": (BF16, hqq(4, 1, BF16), _HQQ),
    "hqq 4 across": (F16, hqq(4, 0, F16), _HQQ),
    "hqq 8": (BF16, hqq(8, 1, BF16), _HQQ),
    "hqq 1": (F16, hqq(1, 1, F16), _HQQ),
    "hqq 2": (F16, hqq(2, 1, F16), _HQQ),
}
"""Element type of the model, what writes a weight, and what the config says."""
