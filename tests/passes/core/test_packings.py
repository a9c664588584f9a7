"""Packings compared with the libraries that define their formats."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from graftc.passes.core.ops.unpack import unpack, unpack_decomposed, unpacked
from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.blockwise import Blockwise, dequantize_4bit, dynamic_values
from graftc.passes.core.packing.packed_tensor import PackedTensor, dense
from graftc.passes.core.packing.packing import PACKINGS, PackedType, Packing, as_bytes, packing_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((96, 64), (48, 40), (33, 7), (4, 6, 24), (1, 1), (2, 8192))
EVERY = (
    *(
        Blockwise(kind, group=group, double=double)
        for kind in ("nf4", "fp4")
        for group in (32, 64)
        for double in (0, 1)
    ),
    *(Affine(kind, group=group) for kind in ("int8", "int4") for group in (0, 16, 64)),
)


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values of very different magnitudes, including zeros and one block of only zeros."""
    torch.manual_seed(len(shape))
    values = torch.randn(shape) * torch.logspace(-3, 1, shape[-1])
    values.reshape(-1)[:: max(2, values.numel() // 7)] = 0
    if shape[0] > 2:
        values[1] = 0
    return values.to(dtype)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes(kind: str, double: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Codes, scales and values equal those of `quantize_4bit` and `dequantize_4bit`, to the bit."""
    library: Any = pytest.importorskip("bitsandbytes.functional")
    original, packing = weight(shape, dtype), Blockwise(kind, double=double)
    parts = dict(zip(packing.parts, packing.packed(original), strict=True))
    codes, state = library.quantize_4bit(original, blocksize=64, compress_statistics=double, quant_type=kind)
    assert torch.equal(parts["codes"], codes)
    theirs = {"codes": codes, "scales": as_bytes(state.absmax.unsqueeze(1))}
    if double:
        theirs["scales"] = state.absmax.unsqueeze(1)
        theirs |= {"nested": as_bytes(state.state2.absmax.unsqueeze(1)), "offset": as_bytes(state.offset)}
        assert torch.equal(parts["offset"], theirs["offset"])
        _nearest(parts, theirs, library.quantize_4bit(original, blocksize=64, quant_type=kind)[1].absmax)
    else:
        assert torch.equal(parts["scales"], theirs["scales"])
    unpacked_values = unpack(list(theirs.values()), packing.text, shape, dtype)
    assert torch.equal(unpacked_values, library.dequantize_4bit(codes, state).reshape(shape))


def _nearest(parts: dict[str, Tensor], theirs: dict[str, Tensor], scales: Tensor) -> None:
    """Check that codes of scales differ only if a ratio is almost midway, where ours is the nearer one.

    The CPU kernel may take either of the two neighbours there.
    """
    if not bool((scales > 1e-30).any()):
        return
    assert torch.equal(parts["nested"], theirs["nested"])
    own, other = parts["scales"].flatten().long(), theirs["scales"].flatten().long()
    nested = parts["nested"].view(torch.float32).repeat_interleave(256)[: len(scales)]
    ratio = (scales - parts["offset"].view(torch.float32)) / nested
    error, others = ((dynamic_values()[code] - ratio).abs() for code in (own, other))
    assert bool((error <= others + 1e-7).all()) and int((own != other).sum()) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_operator_of_bitsandbytes(kind: str, double: bool, dtype: torch.dtype) -> None:
    """The operator that computes the values on CUDA gives the same ones on the CPU."""
    pytest.importorskip("bitsandbytes")
    operator = dequantize_4bit()
    assert operator is not None
    original, packing = weight((48, 64), dtype), Blockwise(kind, double=double)
    parts = packing.packed(original)
    actual = operator(parts[0], packing.form(parts, original.shape).scales, packing.group, kind, (48, 64), dtype)
    assert torch.equal(actual, unpack(parts, packing.text, [48, 64], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [0, 32, 64])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_torchao(kind: str, group: int, dtype: torch.dtype) -> None:
    """Codes and values equal those of torchao's affine primitives, as called for weight-only use, to the bit."""
    pytest.importorskip("torchao", minversion="0.18")  # earlier ones round scales of 16-bit weights in another way
    library: Any = pytest.importorskip("torchao.quantization.quant_primitives")
    original, packing = weight((48, 128), dtype), Affine(kind, group=group)
    block, (low, high) = (1, group or 128), ((-128, 127) if kind == "int8" else (0, 15))
    mapping = library.MappingType.SYMMETRIC if kind == "int8" else library.MappingType.ASYMMETRIC
    target = torch.int8 if kind == "int8" else torch.uint8
    scale, zero = library.choose_qparams_affine(original, mapping, block, target, low, high)
    codes = library.quantize_affine(original, block, scale, zero, target, low, high)
    wanted = library.dequantize_affine(codes, block, scale, zero, target, low, high, output_dtype=dtype)
    parts = packing.packed(original)
    own = parts[0].view(torch.int8) if kind == "int8" else torch.stack([parts[0] & 15, parts[0] >> 4], -1).flatten(-2)
    assert torch.equal(own, codes)
    assert torch.equal(unpack(parts, packing.text, [48, 128], dtype), wanted)


@pytest.mark.parametrize("packing", EVERY, ids=lambda packing: packing.text)
@pytest.mark.parametrize("transposed", [False, True])
def test_round_trip(packing: Packing, transposed: bool) -> None:
    """The fast path, the ATen form and the lazy tensor agree to the bit, and a packing's text parses back."""
    packing = type(packing)(**{**vars(packing), "transposed": transposed})
    assert packing_of(packing.text) == packing
    for shape in SHAPES:
        for dtype in DTYPES:
            original = weight(shape, dtype)
            parts = packing.packed(original)
            assert len(parts) == len(packing.parts) and all(p.dtype == torch.uint8 and p.dim() for p in parts)
            values = unpack(parts, packing.text, shape, dtype)
            assert values.shape == shape and values.dtype == dtype
            assert torch.equal(values, unpack_decomposed(parts, packing.text, shape, dtype))
            assert torch.equal(values, unpacked(parts, packing.text, shape, dtype))
            meta = packing.packed(original.to("meta"))
            assert [(p.shape, p.dtype) for p in meta] == [(p.shape, p.dtype) for p in parts]
    own = PackedType(packing, (48, 40), torch.float32)
    parts = packing.packed(weight((48, 40)))
    lazy = PackedTensor(own, parts)
    assert lazy.shape == (48, 40) and isinstance(lazy.detach(), PackedTensor)
    assert torch.equal(lazy.double(), own.value(parts).double()) and torch.equal(lazy + 1, dense(lazy) + 1)


@pytest.mark.parametrize("packing", EVERY, ids=lambda packing: packing.text)
def test_the_operator(packing: Packing) -> None:
    """The operator passes torch's own checks: schema, fake kernel, tracing."""
    parts = packing.packed(weight((24, 40)))
    torch.library.opcheck(unpack, (parts, packing.text, [24, 40], torch.float32))


@pytest.mark.slow
@given(st.sampled_from([p.text for p in EVERY]), st.text(max_size=12))
def test_what_is_no_packing(text: str, more: str) -> None:
    """Any text in a file is either a packing or refused."""
    for tried in (more, f"{text} {more}", f"{text} group={more}", text + more):
        with suppress(ValueError):
            assert isinstance(packing_of(tried), tuple(PACKINGS.values()))
