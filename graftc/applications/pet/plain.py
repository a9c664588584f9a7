"""Encode texts without a pattern, for a classifier with a head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_UNBOUNDED = 1_000_000
"""If a tokenizer's maximum length is at least this value, its limit is unknown."""


class PlainEncoder:
    """Encoder that turns the fields of a row into one text, or into a pair of texts that the tokenizer joins.

    Args:
        slots: the names of the fields; the first is the text, and all others together are the second text of a pair.
        tokenizer: a transformers tokenizer; it is not changed.
        max_length: the maximum number of tokens; the longer text of a pair is cut first.
        positions: the maximum number of tokens that the model takes, if it has such a limit.
    """

    def __init__(self, slots: Sequence[str], tokenizer: Any, max_length: int, positions: int | None = None) -> None:
        limit = int(tokenizer.model_max_length)
        bounds = [max_length, limit if limit < _UNBOUNDED else None, positions]
        self._length = min(bound for bound in bounds if bound is not None)
        # A copy, because each call leaves its truncation settings in the tokenizer.
        self._slots, self._tokenizer = tuple(slots), copy.deepcopy(tokenizer)

    def encode(self, rows: Sequence[Mapping[str, str]]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, and ``token_type_ids`` if the model takes them.

        All are int64 ``[rows, longest]``, padded on the right.
        """
        first, *rest = self._slots
        pair = [" ".join(row[slot] for slot in rest) for row in rows] if rest else None
        encoded = self._tokenizer(
            [row[first] for row in rows], pair, truncation="longest_first", max_length=self._length
        )
        fills = {"input_ids": pad_id(self._tokenizer), "attention_mask": 0, "token_type_ids": 0}
        fills["token_type_ids"] = int(getattr(self._tokenizer, "pad_token_type_id", 0))
        width = max(map(len, encoded["input_ids"]))
        return {
            name: torch.tensor([[*row, *[fill] * (width - len(row))] for row in encoded[name]], dtype=torch.int64)
            for name, fill in fills.items()
            if name in encoded
        }


def pad_id(tokenizer: Any) -> int:
    """Return the token used for padding: the tokenizer's padding token, or else its end-of-text token, or else 0."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return 0 if token is None else int(token)


def positions_of(model: nn.Module) -> int | None:
    """Return the maximum number of tokens allowed by a model's position embeddings; None if it has none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _TABLES:
            # RoBERTa counts positions from the one after its padding index.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


_TABLES = ("position_embeddings", "wpe", "embed_positions")
