"""Models and batches of the experiments: MiniLM and SmolLM2 with Reuters texts, and tiny models for quick runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.applications.demo.data import encode, find_data, find_model, load_r8, read_tab, training_batches
from graftc.applications.demo.decoder import find_decoder, load_decoder
from graftc.runtime.sources.models import quiet_transformers
from graftc.testing.families import tiny

CLASSES = 8
"""Of Reuters R8."""
TRAINING = "reuters-r8-train.tab"

Batch = dict[str, Tensor]


def files_of(model: str) -> tuple[Path, ...]:
    """Return the files that determine a model's weights and batches; none for tiny models."""
    if model.startswith("tiny-"):
        return ()
    folder = find_model() if model == "minilm" else find_decoder()
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return (*(folder / name for name in names), find_data() / TRAINING)


def base_of(model: str, dtype: torch.dtype, seed: int) -> Any:
    """Return a model in train mode, without dropout and with nothing to train.

    Args:
        model: ``minilm`` (a classifier whose head is drawn from the seed), ``smollm2``, ``tiny-bert`` or
            ``tiny-llama``.
        dtype: of its weights.
        seed: of the head.
    """
    torch.manual_seed(seed)
    if model == "minilm":
        from transformers import AutoModelForSequenceClassification

        with quiet_transformers():
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                find_model(), num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
    elif model == "smollm2":
        loaded = load_decoder()
    elif model == "tiny-bert":
        loaded = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    else:
        loaded = tiny("llama")
    return loaded.to(dtype).requires_grad_(False).train()


def batches_of(
    model: str, count: int, rows: int, tokens: int, seed: int, invocation: Sequence[int] = ()
) -> tuple[Batch, ...]:
    """Return labelled batches, the same in every run.

    A classifier gets texts of the training split, drawn evenly from the classes and padded on the right. A decoder gets
    pieces of consecutive tokens of the same texts; their first token is not a target, because PEFT lets the last
    virtual token predict it.

    Args:
        model: as in `base_of`.
        count: number of batches.
        rows: texts in a batch.
        tokens: length of a text, at most.
        seed: of the choice and the order of texts.
        invocation: tokens to put into the middle of every row of a decoder.
    """
    if model == "minilm":
        from transformers import AutoTokenizer

        texts = encode(
            AutoTokenizer.from_pretrained(find_model()), load_r8().train.balanced(count * rows, seed), tokens
        )
        return tuple(itertools.islice(training_batches(texts, rows, seed), count))
    if model == "tiny-bert":
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 50, (count, rows, tokens), generator=draw)
        labels = torch.randint(0, 3, (count, rows), generator=draw)
        return tuple(
            {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y}
            for i, y in zip(ids, labels, strict=True)
        )
    ids = _pieces(model, count * rows * tokens, seed).view(count, rows, tokens)
    return tuple(_decoder_batch(piece.clone(), invocation) for piece in ids)


def _pieces(model: str, length: int, seed: int) -> Tensor:
    """Return this many tokens of consecutive texts."""
    if model == "tiny-llama":
        return torch.randint(5, 50, (length,), generator=torch.Generator().manual_seed(seed))
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(find_decoder())
    tokens: list[int] = []
    for _, text in read_tab(find_data() / TRAINING):
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= length:
            break
    return torch.tensor(tokens[:length])


def _decoder_batch(ids: Tensor, invocation: Sequence[int]) -> Batch:
    if invocation:
        middle = ids.shape[1] // 2
        ids[:, middle : middle + len(invocation)] = torch.tensor(list(invocation))
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def unlabelled(batch: Mapping[str, Tensor]) -> Batch:
    """Return a batch without its labels."""
    return {name: value for name, value in batch.items() if name != "labels"}
