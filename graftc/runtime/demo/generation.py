"""What the tuned model says, in each of its forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftc.runtime.demo.chat import Chats
from graftc.runtime.demo.data import evaluation_batches

if TYPE_CHECKING:
    from graftc.runtime.deploy.merged import Merged

__all__ = ["BATCH", "greedy", "onnx_generator"]

BATCH = 32
"""Prompts that are continued at once."""


def onnx_generator(merged: Merged, path: Path) -> Any:
    """The merged model in ONNX Runtime, from what this writes to the folder ``path``."""
    from graftc.runtime.generate import load

    return load(merged.export(path, "onnx-generate"))


def greedy(
    model: Any,
    chats: Chats,
    new: int,
    *,
    least: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """What a model continues each prompt with, the most probable token at each step, up to the end of its turn.

    Args:
        model: has transformers' ``generate``.
        chats: their prompts, which are padded on the left.
        new: at most so many tokens.
        least: the end of the turn is not among the choices before so many.
        on_batch: called after each batch with its number of prompts.
    """
    end = model.generation_config.eos_token_id
    found: dict[int, list[int]] = {}
    with torch.no_grad():
        for rows, batch in evaluation_batches(chats, BATCH):
            out = model.generate(
                **batch, do_sample=False, max_new_tokens=new, min_new_tokens=least, pad_token_id=chats.pad
            )
            added = out[:, batch["input_ids"].shape[1] :].tolist()
            found |= {i: _until(row, end) for i, row in zip(rows, added, strict=True)}
            if on_batch is not None:
                on_batch(len(rows))
    return [found[i] for i in range(len(chats))]


def _until(row: list[int], end: int | Sequence[int]) -> list[int]:
    ends = [end] if isinstance(end, int) else end
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
