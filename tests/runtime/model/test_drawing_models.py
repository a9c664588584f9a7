"""Models that draw random numbers in eval mode, as models of speech and of images do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.{first,last}"}}]}


class Draws(nn.Module):
    """A model that adds noise to its states, and checks that the noise is bounded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape[0], 8)
        torch._check_tensor_all(noise.abs().amax() < 40, lambda: "what was drawn is too large")
        h = torch.tanh(self.first(x)) + noise
        return self.last(h + torch.randn_like(h))


def test_one_seed_gives_what_the_source_gives_and_a_merge_is_certified() -> None:
    """A check of drawn numbers is not a check of inputs: it would draw numbers of its own before the call."""
    torch.manual_seed(0)
    model = Draws().eval()
    compiled = graftc.compile(SPEC, model, {"x": torch.randn(3, 6)}, cache=False).eval()

    def drawn(each: Any, seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return each(x=torch.ones(3, 6)), torch.rand(())

    for seed in range(3):
        for own, wanted in zip(drawn(compiled, seed), drawn(model, seed), strict=True):
            assert torch.equal(own, wanted)
    perturb(compiled, 0.3)
    state = torch.get_rng_state()
    merged = compiled.merge()
    assert torch.equal(torch.get_rng_state(), state)
    assert merged.certificate.passed and max(merged.certificate.outputs.values()) < 1e-5
    for seed in range(3):
        for own, wanted in zip(drawn(merged, seed), drawn(compiled, seed), strict=True):
            torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(drawn(merged, 0)[0], drawn(model, 0)[0], atol=1e-2)


class Iterates(nn.Module):
    """A model that iterates a map on its own outputs, which about doubles their distance in each iteration."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.first, self.times = nn.Linear(6, 6), times

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.first(x))
        for _ in range(self.times):
            y = 3.9 * y * (1 - y)
        return y


@pytest.mark.parametrize("times", [3, 14])
def test_the_noise_of_rounding_is_the_budget_of_a_model_that_makes_much_of_it(times: int) -> None:
    """Rounding noise counts in float32 as in 16 bits, and hides no wrong fold, as `test_wrong_folds.py` checks."""
    torch.manual_seed(0)
    model = Iterates(times).eval()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.first"}}]}
    compiled = graftc.compile(spec, model, {"x": torch.randn(64, 6)}, cache=False).eval()
    perturb(compiled, 0.3)
    certificate = compiled.merge().certificate
    assert certificate.passed
    doubted = [note for note in certificate.notes if "weights differently" in note]
    assert bool(doubted) == (times == 14)
    assert certificate.budget < 1e-2
