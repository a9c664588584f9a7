"""Numbers that a model reads from a tensor of its sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import graftc
from graftc.testing import perturb, randomise

WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as it is": lambda y, n: y[: n.item()],
    "sum": lambda y, n: y * (n + 2).item(),
    "difference": lambda y, n: y[: (n - 1).item()],
    "reversed": lambda y, n: y * (64 - n).item(),
    "product": lambda y, n: y * (2 * n - 1).item(),
    "written to": lambda y, n: y * n.add_(1).item(),
    "copy": lambda y, n: y[: n.detach().clone().item()],
}


class Sized(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(6, 8), way

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](self.inner(x), torch.tensor(x.shape[0]))


@pytest.mark.slow
@pytest.mark.sample("difference", "written to")
@pytest.mark.parametrize("way", WAYS)
def test_a_size_that_was_in_a_tensor(way: str) -> None:
    """One graph gives the model's result for every size."""
    torch.manual_seed(0)
    model = Sized(way).eval()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["inner"]}}]}
    compiled = graftc.compile(spec, model, (torch.randn(7, 6),)).eval()
    for size in (7, 2, 3, 12):
        x = torch.randn(size, 6)
        assert torch.equal(compiled(x), model(x)), size


def deberta(**settings: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.DebertaConfig(
        **sizes, intermediate_size=48, max_position_embeddings=64, relative_attention=True, **settings
    )
    return randomise(transformers.DebertaForMaskedLM(config)).eval()


@pytest.mark.full
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"pos_att_type": ["c2p", "p2c"]}, id="both"),
        pytest.param({"pos_att_type": ["c2p"]}, id="content to position"),
        pytest.param({"pos_att_type": ["p2c"], "max_relative_positions": 8}, id="short distances"),
    ],
)
def test_relative_attention(settings: dict[str, Any]) -> None:
    """DeBERTa slices its table of distances by such numbers: eval is equal at all lengths, and it trains and merges."""
    model = deberta(**settings)
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}, model).eval()
    lengths = (9, 1, 4, 33)
    texts = [torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(0)) for length in lengths]
    with torch.no_grad():
        for ids in texts:
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            torch.testing.assert_close(compiled(**given).logits, model(**given).logits, atol=1e-5, rtol=1e-5)
    compiled.train()(input_ids=texts[0], attention_mask=torch.ones_like(texts[0])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in compiled.parameters() if parameter.requires_grad)
    perturb(compiled.eval())
    given = {"input_ids": texts[-1], "attention_mask": torch.ones_like(texts[-1])}
    with torch.no_grad():
        expected = compiled(**given).logits
        torch.testing.assert_close(compiled.merge()(**given).logits, expected, atol=1e-4, rtol=1e-4)
