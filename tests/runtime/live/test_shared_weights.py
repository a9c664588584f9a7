"""Stacks that share weights, one of which runs as graphs of layers and the other as graphs of maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb

X = torch.randn(3, 5, 8)


class Norm(nn.Module):
    """A norm whose weight is converted to the dtype that it already has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight.float()
        return y


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = Norm(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.up(self.norm(x)))
        return y


class Asking(Layer):
    """A layer that is not a graph, because it reads a value."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if float(x.mean()) > 1e6 else x)


class Shared(nn.Module):
    """A model whose decoder has the encoder's norms."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.ModuleList(Asking() for _ in range(2))
        self.encoder = nn.ModuleList(Layer() for _ in range(2))
        for ours, theirs in zip(self.decoder, self.encoder, strict=True):
            ours.norm.weight = theirs.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.encoder, *self.decoder):
            x = layer(x)
        return x


@pytest.mark.slow
def test_no_graph_reads_what_another_has_made_of_a_shared_weight() -> None:
    model = Shared().eval()
    spec: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.up"}}]}
    compiled = graftc.compile(spec, model, {"x": X}, cache=False)
    assert {stack.stack: stack.level for stack in compiled.report.stacks} == {"decoder": "modules", "encoder": "layers"}
    other = torch.randn(2, 7, 8)
    with torch.no_grad():
        assert torch.equal(compiled(x=other), model(other))
    perturb(compiled)
    merged = compiled.merge()
    with torch.no_grad():
        torch.testing.assert_close(merged(x=other), compiled(x=other), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged(x=other), model(other))
