"""Folds round once and correctly, compared with exact arithmetic that shares no code with torch's conversions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graftc
from graftc.passes.core.weights.folds import FoldStep, LazyTensors, round_once
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny

FORMATS = {torch.bfloat16: (8, -126, 127), torch.float16: (11, -14, 15), torch.float32: (24, -126, 127)}
"""Bits of the significand, smallest and largest exponent of a normal number."""


def nearest(value: float, dtype: torch.dtype) -> float:
    """Round ``value`` to nearest, ties to even, in rational arithmetic."""
    bits, lowest, highest = FORMATS[dtype]
    exact = Fraction(value)
    if exact == 0:
        return value
    size = abs(exact)
    exponent = max(math.frexp(value)[1] - 1, lowest)
    unit = Fraction(2) ** (exponent - bits + 1)
    whole, rest = divmod(size, unit)
    up = rest * 2 > unit or (rest * 2 == unit and whole % 2 == 1)
    rounded = (whole + up) * unit
    if rounded >= Fraction(2) ** (highest + 1):
        return math.copysign(math.inf, value)
    return math.copysign(float(rounded), value)


def rounded(values: list[float], dtype: torch.dtype) -> list[float]:
    """Return the results of `round_once`."""
    return round_once(torch.tensor(values, dtype=torch.float64), dtype).double().tolist()


@st.composite
def near_halfway(draw: st.DrawFn) -> tuple[torch.dtype, float]:
    """Draw a number at, or within some float64 steps of, the midpoint between two neighbours of a format."""
    dtype = draw(st.sampled_from(list(FORMATS)))
    bits, lowest, highest = FORMATS[dtype]
    significand = draw(st.integers(1, 2**bits - 1))
    exponent = draw(st.integers(lowest - bits + 1, highest - bits + 1))
    middle = math.ldexp(2 * significand + 1, exponent - 1)
    for _ in range(draw(st.integers(0, 2))):
        middle = math.nextafter(middle, draw(st.sampled_from([-math.inf, math.inf])))
    offset = draw(st.sampled_from([0.0, 2.0**-24, -(2.0**-24), 2.0**-26, -(2.0**-26), 2.0**-40]))
    return dtype, draw(st.sampled_from([1.0, -1.0])) * middle * (1 + offset)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(near_halfway())
def test_halfway(case: tuple[torch.dtype, float]) -> None:
    """Ties go to even, and near ties go to the nearer neighbour."""
    dtype, value = case
    assert rounded([value], dtype) == [nearest(value, dtype)]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(FORMATS)),
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
)
def test_any_number(dtype: torch.dtype, values: list[float]) -> None:
    """Every finite float64 is rounded correctly, including subnormal results and overflow."""
    actual = rounded(values, dtype)
    expected = [nearest(value, dtype) for value in values]
    assert actual == expected
    assert [math.copysign(1, x) for x in actual] == [math.copysign(1, x) for x in expected]


def test_once_and_not_twice() -> None:
    """torch's own conversion rounds through float32 to the wrong neighbour; ours does not."""
    value = 1 + 2.0**-8 + 2.0**-30
    assert float(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16)) == 1.0
    assert rounded([value], torch.bfloat16) == [1 + 2.0**-7] == [nearest(value, torch.bfloat16)]


def test_what_is_not_finite() -> None:
    """Infinities and NaN stay unchanged."""
    for dtype in FORMATS:
        actual = rounded([math.inf, -math.inf, math.nan, 1e300], dtype)
        assert actual[:2] == [math.inf, -math.inf]
        assert math.isnan(actual[2])
        assert actual[3] == math.inf


def bf16_bits(values: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Convert float64 to the bits of bfloat16 by integer arithmetic on the bits of float64, for normal results."""
    bits = values.contiguous().numpy().view(np.int64)
    sign = (bits >> 63) & 1
    size = bits & 0x7FFF_FFFF_FFFF_FFFF
    dropped = 52 - 7
    low = size & ((1 << dropped) - 1)
    kept = size >> dropped
    half = 1 << (dropped - 1)
    kept = kept + ((low > half) | ((low == half) & (kept & 1 == 1)))
    assert bool(((kept >> 7) > 1023 - 126).all())
    return (kept - ((1023 - 127) << 7)) | (sign << 15)


def held_bits(values: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the bits of a bfloat16 tensor."""
    return values.contiguous().view(torch.int16).numpy().astype(np.int64) & 0xFFFF


def test_bf16_fold_is_correctly_rounded() -> None:
    """At most one in 10,000 of half a million elements differs from the rounded float64 result, by one unit."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(512, 1024, generator=generator) * 0.05).bfloat16()
    a = (torch.randn(8, 1024, generator=generator) * 0.1).bfloat16()
    b = (torch.randn(512, 8, generator=generator) * 0.1).bfloat16()
    store = Store()
    store.add_parameter("map.weight", weight, trainable=False)

    def apply(w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + 2.0 * (b.double() @ a.double()), bias

    own = WeightSlice("map.weight", (512, 1024), Layout.ROWS)
    step = FoldStep("lora", "map.weight", own, own.companion("map.bias"), apply)
    actual = held_bits(LazyTensors(store, [step]).folded("map.weight"))
    # Products of two 8-bit significands, and sums of 8 of them, are exact in float64: this is the true value.
    exact = weight.double() + 2.0 * torch.einsum("or,ri->oi", b.double(), a.double())
    expected = bf16_bits(exact)
    distance = np.abs(actual - expected)
    assert distance.max() <= 1
    assert (distance != 0).sum() * 10_000 <= distance.size
    twice = held_bits((weight + (2.0 * (b @ a)).bfloat16()).bfloat16())
    assert (twice != expected).mean() > 0.01, "rounding on the way is not told from rounding once"


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_bf16_model(family: str) -> None:
    """A bfloat16 model folds end to end: folded elements are correctly rounded float64 ones, except one in 10,000."""
    role = ["attn.q", "attn.v", "ffn.down"]
    spec = {"adapt": [{"method": "lora", "target": {"role": role}, "rank": 4, "alpha": 6}]}
    compiled = graftc.compile(spec, tiny(family, dtype=torch.bfloat16)).eval()
    tensors = perturb(compiled)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    merged = compiled.merge()
    wrong = total = 0
    for resolved in compiled.compilation.main.resolved:
        for site, _ in resolved.sites:
            before = site.own.operand(compiled.compilation.store.get(site.own.tensor).double())
            after = site.own.operand(merged.folded_state_dict()[site.own.tensor])
            assert after.dtype is torch.bfloat16
            name = ".".join(p for p in (site.key.module, "graftc.lora", site.key.part) if p)
            a, b = (tensors[f"{name}.{factor}"].double() for factor in "AB")
            exact = before + 6 / 4 * torch.einsum("or,ri->oi", b, a)
            distance = np.abs(held_bits(after) - bf16_bits(exact))
            assert distance.max() <= 1
            wrong, total = wrong + int((distance != 0).sum()), total + distance.size
    assert total > 16_000
    assert wrong * 10_000 <= total
    inputs = inputs_for(compiled)
    outputs = outputs_of(compiled, inputs)
    assert outputs[0].dtype is torch.bfloat16
    assert largest_difference(outputs_of(merged, inputs), outputs) <= merged.certificate.budget
    assert merged.certificate.passed
