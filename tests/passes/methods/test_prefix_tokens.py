"""A prefix that starts from tokens acts like these tokens before the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, same_bits
from graftc.testing.families import tiny

TOKENS = [7, 23, 41, 11]


def spec(**fields: Any) -> dict[str, Any]:
    """A spec with a prefix that starts from `TOKENS`."""
    fields = {"positions": "shifted", "init": "tokens", "init_tokens": TOKENS, **fields}
    return {"adapt": [{"method": "prefix", "length": len(TOKENS), **fields}]}


def texts() -> Tensor:
    """Two rows of tokens."""
    torch.manual_seed(5)
    return torch.randint(5, 90, (2, 9))


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "gpt2 eager", "gpt_neox", "llama", "mixtral"])
def test_a_decoder_has_read_the_tokens(family: str) -> None:
    """Logits equal those after the tokens, with learned and rotary positions, shared heads and windows."""
    family, _, implementation = family.partition(" ")
    changes: dict[str, Any] = {"attn_implementation": implementation} if implementation else {}
    if family == "mixtral":
        changes["sliding_window"] = 5
    model, ids = tiny(family, **changes), texts()
    compiled = graftc.compile(spec(window="masked"), model).eval()
    before = torch.tensor([TOKENS]).expand(2, -1)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([before, ids], 1)).logits[:, len(TOKENS) :]
        actual = compiled(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        assert largest_difference([model(input_ids=ids).logits], [expected]) > 1e-2
    assert largest_difference([actual], [expected]) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_it_starts_the_same_each_time(family: str) -> None:
    """The start is not drawn: it does not depend on the seed, on adaptations before it, or on the mode."""
    first = graftc.compile(spec(), tiny(family)).adapter_state_dict()
    lora = {"method": "lora", "target": {"role": "attn.k"}, "rank": 2, "dropout": 0.5}
    prompt = {"method": "prefix", "name": "other", "length": 2, "positions": "shifted"}
    second = graftc.compile({"adapt": [lora, prompt, *spec()["adapt"]]}, tiny(family).train(), seed=3)
    own = {n: t for n, t in second.adapter_state_dict().items() if ".prefix." in n}
    assert same_bits(list(first.values()), [own[n] for n in first])
    assert all(float(t.std()) > 0 for t in first.values())


@pytest.mark.full
def test_without_values() -> None:
    """On the meta device no values are read."""
    with torch.device("meta"):
        from transformers import GPT2Config, GPT2LMHeadModel

        model: nn.Module = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50))
    compiled = graftc.compile(spec(), model)
    assert all(t.is_meta for t in compiled.adapter_state_dict().values())


@pytest.mark.slow
def test_what_cannot_start_from_tokens() -> None:
    """Each case has its code: fields that do not go together, tokens outside of the vocabulary, and images."""
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("gpt2", {"init": "normal"}, "GC002"),
        ("gpt2", {"init_tokens": [3]}, "GC002"),
        ("gpt2", {"reparameterization": {}}, "GC002"),
        ("gpt2", {"init_tokens": [1, 2, 3, 5000]}, "GC039"),
        ("gpt2", {"overrides": [{"layers": 0, "length": 2}]}, "GC002"),
        ("vit", {}, "GC017"),
    ]
    for family, fields, code in cases:
        with pytest.raises(GraftError) as caught:
            graftc.compile(spec(**fields), tiny(family))
        assert caught.value.code == code
