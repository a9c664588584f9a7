"""A difference between ONNX Runtime and torch counts as rounding only if rounding in torch alone is as large."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from graftc.compiler.folding.rounding import rounded_differently
from graftc.runtime.export.module import ExportModule
from graftc.runtime.export.onnx_check import TIMES, TOLERANCE, require_close, rounded_outputs
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.models import adapted

LARGEST = 20.0
EXPECTED = {"logits": torch.tensor([[LARGEST, -3.0, 1.0]]), "other": torch.tensor([1.0])}


def moved(by: float, name: str = "logits") -> Mapping[str, Tensor]:
    """Return the expected outputs with one entry of one of them moved."""
    return {own: value + by * (own == name) * torch.eye(value.shape[-1])[-1] for own, value in EXPECTED.items()}


def difference(relative: float) -> Mapping[str, Tensor]:
    """Return outputs that differ by a multiple of the tolerance."""
    return moved(relative * TOLERANCE * LARGEST)


def never() -> Iterator[Mapping[str, Tensor]]:
    """Fail as soon as a rounding is computed."""
    raise AssertionError("computed without need")
    yield {}


def test_nothing_is_computed_for_a_small_difference() -> None:
    require_close(difference(0.9), EXPECTED, None, never())
    with pytest.raises(AssertionError):
        require_close(difference(1.1), EXPECTED, None, never())


@pytest.mark.parametrize(("noise", "right"), [(0.0, False), (0.9, False), (1.1, True), (50.0, True)])
def test_twice_the_effect_of_rounding_is_allowed(noise: float, right: bool) -> None:
    rounded = [difference(noise / 2), difference(noise)]
    if right:
        require_close(difference(2), EXPECTED, None, rounded)
        return
    with pytest.raises(
        GraftError, match=r"logits of ONNX Runtime differs from torch's by 4\.00e-03, more than"
    ) as error:
        require_close(difference(2), EXPECTED, None, rounded)
    assert error.value.code == "GC060"


def test_noise_of_one_output_explains_no_other() -> None:
    with pytest.raises(GraftError, match="other"):
        require_close(moved(1e-3, "other"), EXPECTED, None, [difference(1000)])


def test_rounding_explains_at_most_a_hundredth() -> None:
    require_close(moved(0.0099 * LARGEST), EXPECTED, None, [moved(1.0)])
    with pytest.raises(GraftError, match=r"2\.00e-01"):
        require_close(moved(0.0101 * LARGEST), EXPECTED, None, [moved(1.0)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_never_rounding(value: float) -> None:
    with pytest.raises(GraftError, match="finite"):
        require_close(moved(value), EXPECTED, None, [moved(1e9)])


def test_positions_that_do_not_count_are_not_compared() -> None:
    expected = {"logits": torch.zeros(1, 2, 3)}
    outputs, counting = {"logits": torch.tensor([[[0.0] * 3, [1.0] * 3]])}, torch.tensor([[True, False]])
    require_close(outputs, expected, counting, never())
    with pytest.raises(GraftError):
        require_close(outputs, expected, ~counting, [expected])


def test_weights_move_by_rounding_alone_and_stay_as_they_are() -> None:
    compiled = adapted("llama", {"method": "lora", "target": {"role": ["attn.q"]}})
    merged = compiled.merge()
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    module = ExportModule(merged._graftc, compiled.compilation.main.signature)
    inputs = module.sample()
    with torch.no_grad():
        (expected,) = module.module(**inputs).values()
    logits = [value for own in rounded_outputs(module, inputs) for value in own.values()]
    moves = [float((value - expected).abs().max() / expected.abs().max()) for value in logits]
    assert len(moves) == TIMES and len(set(moves)) > 1 and all(1e-9 < move < 1e-5 for move in moves)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merged.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rounded_weight_is_a_copy(dtype: torch.dtype) -> None:
    weight = torch.linspace(-3, 3, 1000).to(dtype)
    before = weight.clone()
    rounded = rounded_differently(weight, torch.Generator().manual_seed(0))
    assert torch.equal(weight, before) and rounded.dtype == dtype and not torch.equal(rounded, weight)
    assert bool(((rounded - weight).double().abs() <= weight.double().abs() * torch.finfo(dtype).eps).all())
