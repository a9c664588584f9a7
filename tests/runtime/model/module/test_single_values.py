"""Statistics of a single value are refused in train mode, as the source model refuses them, and nothing is updated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graftc

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["inner"]}}]}


class Normed(nn.Module):
    """A linear map, a normalisation over the batch or over positions, and another linear map."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(6, 8), norm, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y = self.norm(y.transpose(1, 2)).transpose(1, 2) if y.dim() > 2 else self.norm(y)
        z: Tensor = self.outer(torch.relu(y))
        return z


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "batch": (lambda: nn.BatchNorm1d(8), (4, 6), (1, 6), (3, 6)),
    "batch without affine": (lambda: nn.BatchNorm1d(8, affine=False), (4, 6), (1, 6), (3, 6)),
    "batch without statistics": (lambda: nn.BatchNorm1d(8, track_running_stats=False), (4, 6), (1, 6), (3, 6)),
    "batch of places": (lambda: nn.BatchNorm1d(8), (4, 5, 6), (1, 1, 6), (1, 2, 6)),
    "instance": (lambda: nn.InstanceNorm1d(8, affine=True, track_running_stats=True), (4, 5, 6), (4, 1, 6), (1, 2, 6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_value_raises(name: str) -> None:
    make, sample, single, enough = CASES[name]
    model = Normed(make())
    compiled = graftc.compile(SPEC, model, (torch.randn(sample),)).train()
    model.train()
    compiled(torch.randn(enough))
    before = {n: t.clone() for n, t in compiled.state_dict().items() if "running" in n}
    # torch 2.11 gives every length a graph of its own; that of a single value cannot be made.
    lengths = compiled.program("train").inputs[0].ranges[:-1]
    refusal = graftc.GraftError if any(low == high for low, high in lengths) else ValueError
    for module, kind in ((model, ValueError), (compiled, refusal)):
        with pytest.raises(kind, match="Expected more than 1 "):
            module(torch.randn(single))
    after = compiled.state_dict()
    assert all(torch.equal(t, after[n]) and bool(t.isfinite().all()) for n, t in before.items())
    x = torch.randn(enough)
    model.requires_grad_(False)  # some processors multiply differently if a weight requires a gradient
    model.load_state_dict(model.state_dict() | {n: t for n, t in before.items() if n in model.state_dict()})
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", [name for name in CASES if name in ("batch", "batch without affine")])
def test_one_value_is_enough_in_eval_mode(name: str) -> None:
    make, sample, single, _ = CASES[name]
    model = Normed(make())
    compiled = graftc.compile(SPEC, model, (torch.randn(sample),)).eval()
    x = torch.randn(single)
    assert torch.equal(compiled(x), model.eval()(x))
    with pytest.raises(ValueError, match="Expected more than 1 "):
        compiled.train()(x)
