"""Calls whose structure differs from the one that a model was compiled with, derived from a batch at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Any]
TEXT = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids")
FIRST_IMAGE_TOKEN = 200
WORD = 7


def _without(name: str) -> Callable[[Batch, random.Random], Batch]:
    return lambda batch, _: {key: value for key, value in batch.items() if key != name}


def _longer(batch: Batch, chance: random.Random) -> Batch:
    """Append words to each text."""
    if not isinstance(batch.get("input_ids"), Tensor) or batch["input_ids"].dim() != 2:
        return batch
    more, longer = chance.randint(1, 6), dict(batch)
    for name in TEXT:
        if isinstance(value := batch.get(name), Tensor) and value.shape[:2] == batch["input_ids"].shape:
            filling = {"input_ids": WORD, "attention_mask": 1, "labels": WORD}.get(name, 0)
            longer[name] = torch.cat([value, torch.full((len(value), more), filling, dtype=value.dtype)], 1)
    return longer


def _text_alone(batch: Batch, _: random.Random) -> Batch:
    """Remove images and sounds, and replace their tokens by words."""
    if not isinstance(ids := batch.get("input_ids"), Tensor) or not (ids >= FIRST_IMAGE_TOKEN).any():
        return batch
    texts = {name: value for name, value in batch.items() if name in TEXT}
    texts["input_ids"] = ids.masked_fill(ids >= FIRST_IMAGE_TOKEN, WORD)
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in texts:
            texts[name] = torch.zeros_like(texts[name])
    return texts


def _rows(batch: Batch) -> int:
    """Return the number of rows if every tensor has the same number; 0 otherwise."""
    sizes = {len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()}
    return sizes.pop() if len(sizes) == 1 else 0


def _one_row(batch: Batch, chance: random.Random) -> Batch:
    if not (rows := _rows(batch)):
        return batch
    at = chance.randrange(rows)
    return {name: value[at : at + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}


def _twice(batch: Batch, _: random.Random) -> Batch:
    if not _rows(batch):
        return batch
    return {name: torch.cat([value, value]) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _with(name: str, value: Any) -> Callable[[Batch, random.Random], Batch]:
    return lambda batch, _: {**batch, name: value}


CHANGES: Mapping[str, Callable[[Batch, random.Random], Batch]] = {
    "no mask": _without("attention_mask"),
    "no labels": _without("labels"),
    "longer": _longer,
    "text alone": _text_alone,
    "one row": _one_row,
    "twice": _twice,
    "cache": _with("use_cache", True),
    "hidden states": _with("output_hidden_states", True),
    "tuple": _with("return_dict", False),
    "last logits": _with("logits_to_keep", 1),
}
MUST_RUN = {"no mask", "no labels", "longer", "text alone", "one row", "twice"}
"""Changes after which a call may not be refused."""


def random_call(batches: list[Batch], seed: int) -> tuple[Batch, bool, set[str]]:
    """Return a call, whether it is in train mode, and the names of the changes."""
    chance = random.Random(seed)
    batch, changed = dict(chance.choice(batches)), set(chance.sample(sorted(CHANGES), chance.randint(0, 3)))
    for name in sorted(changed):
        batch = CHANGES[name](batch, chance)
    return batch, chance.random() < 0.5, changed
