"""The position where a model fills blanks follows from the model, whatever tokens its tokenizer has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertLMHeadModel

from graftc.applications.pet.direction import blank_kind, reads_ahead
from graftc.testing import tiny
from tests.applications.pet.small import model, sentinels, tokenizer


def _bert_head(is_decoder: bool) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(0)
    return BertLMHeadModel(BertConfig(vocab_size=40, is_decoder=is_decoder, **sizes))


@pytest.mark.parametrize(
    ("make", "ahead"),
    [
        (model, True),
        (functools.partial(tiny, "roberta"), None),  # a classifier, which has no logits of tokens
        (functools.partial(tiny, "gpt2"), False),
        (functools.partial(tiny, "llama"), False),
        (functools.partial(tiny, "mixtral"), False),
        (functools.partial(_bert_head, False), True),
        (functools.partial(_bert_head, True), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whether_a_model_reads_ahead(make: Callable[[], nn.Module], ahead: bool | None, dtype: torch.dtype) -> None:
    module = make().to(dtype).train()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    state = torch.random.get_rng_state()
    assert reads_ahead(module) is ahead
    assert module.training and torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert (id(tensor), True) == (before[name][0], torch.equal(tensor, before[name][1]))


@pytest.mark.parametrize(
    ("make", "words", "kind"),
    [
        (model, tokenizer, "mask"),
        (functools.partial(tiny, "gpt2"), tokenizer, "last"),
        (functools.partial(tiny, "gpt2"), sentinels, "last"),
        (functools.partial(tiny, "t5"), sentinels, "sentinel"),
        (functools.partial(tiny, "t5"), tokenizer, "mask"),
        (lambda: nn.Linear(2, 2), tokenizer, None),
    ],
)
def test_what_a_blank_is(make: Callable[[], nn.Module], words: Callable[[], Any], kind: str | None) -> None:
    assert blank_kind(make(), words()) == kind
