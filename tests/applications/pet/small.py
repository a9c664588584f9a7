"""A tiny masked language model with a tokenizer of whole words, and a task that it can learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from graftc.applications.pet.data import PetData, TextRows

SPACE = ["moon", "orbit", "rocket", "star", "comet"]
HOCKEY = ["puck", "ice", "goal", "rink", "skate"]
OTHER = ["the", "a", "was", "seen", "near", "today", "about", "text", "this", "it", "topic", "is", ".", ":"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *OTHER, *SPACE, *HOCKEY, "space", "hockey", "sports", "nasa"]

SPEC: dict[str, Any] = {
    "patterns": ["{text} . it is about {blank} .", "topic : {blank} . {text}"],
    "verbalizer": {"space": ["space", "nasa"], "hockey": "hockey"},
    "seeds": 1,
    "training": {"steps": 12, "learning_rate": 5e-3, "max_length": 24},
    "classifier": {"training": {"steps": 40, "learning_rate": 5e-3, "max_length": 24}},
}
LORA: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 4, "target": {"role": ["attn.q", "attn.v", "ffn.up"]}}]}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word."""
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    pair = [("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))]
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pair
    )
    names = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **{f"{name}_token": token for name, token in names.items()},
    )


def sentinels() -> PreTrainedTokenizerFast:
    """A tokenizer without a mask token, with the first sentinel of T5."""
    vocabulary = {word: number for number, word in enumerate([*WORDS, "<extra_id_0>"])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "additional_special_tokens": ["<extra_id_0>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **names)


def model(seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny BERT with its language-model head."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **{**sizes, **changes})
    return BertForMaskedLM(config).eval()


def texts(count: int, seed: int) -> tuple[list[Mapping[str, str]], list[int]]:
    """Return sentences about space, with label 0, and about hockey, with label 1."""
    draw = torch.Generator().manual_seed(seed)

    def pick(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=draw))]

    rows, labels = [], []
    for number in range(count):
        topic = (SPACE, HOCKEY)[number % 2]
        rows.append({"text": f"the {pick(topic)} was seen near {pick(topic)} today"})
        labels.append(number % 2)
    return rows, labels


def data(labelled: int = 6, unlabelled: int = 24, test: int = 12) -> PetData:
    """Return rows of the task: labelled, unlabelled and for testing."""

    def part(count: int, seed: int, known: bool = True) -> TextRows | None:
        rows, labels = texts(count, seed)
        return TextRows(tuple(rows), tuple(labels) if known else None) if count else None

    return PetData(part(labelled, 1), part(unlabelled, 2, known=False), part(test, 3))
