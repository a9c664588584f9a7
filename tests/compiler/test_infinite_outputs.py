"""Outputs that are infinite or NaN in places, such as masked scores and rows of padding alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.models import adapted

INFINITE, NONE = float("inf"), float("nan")
SPEC = {"adapt": [{"name": "first", "method": "lora", "rank": 2, "target": {"modules": ["inner"]}}]}
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "masked": lambda y: y.masked_fill(torch.tensor([True, False, False, False]), -INFINITE),
    "infinite": lambda y: y + torch.tensor([INFINITE, 0.0, -INFINITE, 0.0]),
    "no number": lambda y: y + torch.tensor([NONE, 0.0, 0.0, 0.0]),
    "log of zero": lambda y: torch.cat([y, (y[:, :1] * 0).log()], 1),
}


class Masked(nn.Module):
    def __init__(self, mask: str) -> None:
        super().__init__()
        self.inner, self.outer, self.mask = nn.Linear(6, 8), nn.Linear(8, 4), mask

    def forward(self, x: Tensor) -> Tensor:
        return MASKS[self.mask](self.outer(self.inner(x)))


@pytest.mark.full
@pytest.mark.parametrize("mask", MASKS)
def test_the_rest_is_certified(mask: str, tmp_path: Path) -> None:
    """Merging, saving, verifying and exporting work, within a budget for the finite numbers."""
    compiled = adapted(Masked(mask), **SPEC, inputs=(torch.randn(4, 6),))
    merged = compiled.merge()
    assert merged.certificate.passed and 0 < merged.certificate.budget < 1e-2
    assert all(0 <= value < 1e-5 for value in merged.certificate.outputs.values())
    artifact = compiled.save(tmp_path / "artifact")
    assert all(check.passed for check in verify(artifact, compiled.compilation.source).checks)
    compiled.export(tmp_path / "model.onnx")
    merged.export(tmp_path / "merged.onnx")


@pytest.mark.sample("base")
@pytest.mark.slow
@pytest.mark.parametrize("where", ["adapter", "base"])
def test_what_is_not_finite_at_all_is_told(where: str, tmp_path: Path) -> None:
    compiled = adapted(Masked("masked"), **SPEC, inputs=(torch.randn(4, 6),))
    with torch.no_grad():
        named = dict(compiled.named_parameters())
        named["inner.graftc.first.B" if where == "adapter" else "outer.bias"].fill_(NONE)
    for call in (compiled.merge, lambda: compiled.save(tmp_path / "artifact")):
        with pytest.raises(GraftError, match=r"not finite") as caught:
            call()
        assert caught.value.code == "GC051" and "look for NaN" in str(caught.value.hint)
    with pytest.raises(GraftError, match="not finite in torch") as caught:
        compiled.export(tmp_path / "model.onnx")
    assert caught.value.code == "GC060" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ([1.0, INFINITE], [1.5, INFINITE], 0.5),
        ([1.0, -INFINITE], [1.0, INFINITE], INFINITE),
        ([1.0, INFINITE], [1.0, 2.0], INFINITE),
        ([1.0, NONE], [1.25, NONE], 0.25),
        ([1.0, 2.0], [1.0, NONE], NONE),
        ([NONE, NONE], [NONE, NONE], NONE),
        ([INFINITE], [INFINITE], NONE),
        ([], [], 0.0),
    ],
)
def test_largest_difference(a: list[float], b: list[float], difference: float) -> None:
    actual = largest_difference(torch.tensor(a), torch.tensor(b))
    assert actual == difference or (actual != actual and difference != difference)


def test_largest_number() -> None:
    assert largest_number(torch.tensor([1.0, -3.0, INFINITE, NONE])) == 3
    assert largest_number(torch.tensor([INFINITE])) == largest_number(torch.zeros(0)) == 0
