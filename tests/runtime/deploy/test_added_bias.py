"""Biases that folding adds: only beside a weight that the map reads as a whole; elsewhere the adaptation stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb

NO_PLACE = r"cannot fold at .*: it adds a bias, and the model has no place for one"


class Attending(nn.Module):
    """Attention of torch without biases: three maps read parts of one tensor, and a fourth another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + attended


class TwoWeights(nn.Module):
    """A module that reads two weights with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.up).tanh(), self.down)


class Fused(nn.Module):
    """A linear module whose result is split."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 12, bias=False), nn.Linear(6, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        result: Tensor = x + self.down(gate.sigmoid() * up)
        return result


def adapted(model: nn.Module, target: dict[str, Any]) -> tuple[Any, Tensor]:
    """Return a model with perturbed biases where it has none, and an input."""
    torch.manual_seed(0)
    spec = {"adapt": [{"name": "biases", "method": "bitfit", "add_missing": True, "target": target}]}
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    compiled = graftc.compile(spec, model.double(), {"x": x}, cache=False).eval()
    perturb(compiled)
    return compiled, x


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (Attending, {"role": "attn.v"}),
        (Attending, {"role": ["attn.q", "attn.k", "attn.v"]}),
        (Attending, {"role": "attn.o"}),
        (TwoWeights, {"modules": "*"}),
    ],
)
def test_a_bias_without_a_place_stays(model: type[nn.Module], target: dict[str, Any]) -> None:
    """The maps of attention of torch call it by one module: a bias by its name would belong to four maps."""
    compiled, x = adapted(model(), target)
    expected = compiled(x)
    with pytest.raises(GraftError, match=NO_PLACE) as caught:
        compiled.merge()
    assert caught.value.code == "GC050"
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)


def test_a_bias_of_a_module_folds() -> None:
    """A linear module has the place, whether its result is split or not; its folded tensors fit torch's own module."""
    compiled, x = adapted(Fused(), {"modules": ["both", "down"]})
    merged = compiled.merge()
    torch.testing.assert_close(merged(x), compiled(x), rtol=1e-12, atol=1e-12)
    plain = Fused()
    plain.both, plain.down = nn.Linear(8, 12), nn.Linear(6, 8)
    plain.double().load_state_dict(merged.folded_state_dict())
    torch.testing.assert_close(plain(x), compiled(x), rtol=1e-12, atol=1e-12)
