"""Texts without a pattern, for a classifier with a head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_UNBOUNDED = 1_000_000
"""From here on a tokenizer's largest length means that it does not know one."""


class PlainEncoder:
    """Fields of rows as a text, or as a pair of texts, as the tokenizer joins them.

    Args:
        slots: names of the fields: the first is the text, and the others are the second of a pair.
        tokenizer: of transformers; it is left as it is.
        max_length: tokens at most; the longer of a pair is cut first.
        positions: tokens that the model takes at most, if it has such a bound.
    """

    def __init__(self, slots: Sequence[str], tokenizer: Any, max_length: int, positions: int | None = None) -> None:
        own = int(tokenizer.model_max_length)
        bounds = [max_length, own if own < _UNBOUNDED else None, positions]
        self._length = min(bound for bound in bounds if bound is not None)
        # A call leaves its truncation in the tokenizer.
        self._slots, self._tokenizer = tuple(slots), copy.deepcopy(tokenizer)

    def encode(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``, padded on the right, and ``token_type_ids``
        where the model takes them."""
        first, *rest = self._slots
        pair = [" ".join(row[slot] for slot in rest) for row in rows] if rest else None
        made = self._tokenizer([row[first] for row in rows], pair, truncation="longest_first", max_length=self._length)
        fills = {"input_ids": pad_id(self._tokenizer), "attention_mask": 0, "token_type_ids": 0}
        fills["token_type_ids"] = int(getattr(self._tokenizer, "pad_token_type_id", 0))
        width = max(map(len, made["input_ids"]))
        return {
            name: torch.tensor([[*row, *[fill] * (width - len(row))] for row in made[name]], dtype=torch.int64)
            for name, fill in fills.items()
            if name in made
        }


def pad_id(tokenizer: Any) -> int:
    """What fills a batch: the tokenizer's padding, or else the end of a text."""
    own = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if own is None else int(own)


def positions_of(model: nn.Module) -> int | None:
    """Tokens that a model takes at most, by its table of positions; None where it has none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # RoBERTa counts positions from behind that of its padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


_TABLES = ("position_embeddings", "wpe", "embed_positions")
