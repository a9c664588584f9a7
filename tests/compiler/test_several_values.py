"""Operators with several results, in the middle of a model whose roles are read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graftc
from graftc.testing import perturb


class Pooled(nn.Module):
    """Attention over the output of a convolution, pooled to its largest values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.adaptive_max_pool2d(self.stem(x), (4, 4)).flatten(2).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        logits: Tensor = self.head(mixed.mean(1))
        return logits


@pytest.mark.slow
def test_roles_are_read_through_pooling_that_gives_places() -> None:
    model, x = Pooled().eval().requires_grad_(False), torch.randn(2, 3, 16, 16)
    roles = graftc.roles(model, {"x": x}, cache=False).by_role()
    assert {role: [item.module for item in roles[role]] for role in ("attn.q", "attn.v")} == {
        "attn.q": ["query"],
        "attn.v": ["value"],
    }
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "stem"}}]}
    compiled = graftc.compile(spec, model, {"x": x}, cache=False)
    with torch.no_grad():
        assert torch.equal(compiled(x=x), model(x))
    perturb(compiled)
    with torch.no_grad():
        torch.testing.assert_close(compiled.merge()(x=x), compiled(x=x), rtol=1e-5, atol=1e-5)


class Halved(nn.Module):
    """Branches that are half of what their maps compute."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + outer(torch.tanh(inner(x))).chunk(2, -1)[0]
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.slow
def test_roles_are_read_where_a_branch_is_half_of_what_its_map_gives() -> None:
    model, x = Halved().eval(), torch.randn(2, 5, 8)
    roles = graftc.roles(model, {"x": x}, cache=False)
    assert roles.having("head")
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "outer.*"}}]}
    compiled = graftc.compile(spec, model, {"x": x}, cache=False)
    perturb(compiled)
    with torch.no_grad():
        torch.testing.assert_close(compiled.merge()(x=x), compiled(x=x), rtol=1e-5, atol=1e-5)
