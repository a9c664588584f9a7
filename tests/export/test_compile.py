"""``torch.compile``: one graph, and no second compilation among batch sizes of 2 and more."""

from __future__ import annotations

import pytest
import torch

import graftc
from graftc.testing import perturb
from graftc.testing.deployment import check_compile
from tests.families import tiny


@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.full)])
def test_folded_model(family: str) -> None:
    """The folded model compiles like the adapted one, which the contract of LoRA's deployment checks."""
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "rank": 4}]}
    compiled = graftc.compile(spec, tiny(family)).eval()
    perturb(compiled)
    check_compile(compiled.merge(), backend="aot_eager")


def test_the_check_notices_a_recompilation() -> None:
    """A model that asks for its batch size would be caught."""

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x) * (2 if x.shape[0] == 2 else 3)

    whole = torch.compile(Counting(), fullgraph=True, dynamic=True, backend="eager")
    whole(torch.randn(2, 4))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match=r"[Rr]ecompil"):
        whole(torch.randn(3, 4))
    torch._dynamo.reset()
