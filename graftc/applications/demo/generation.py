"""Generate text with each form of the tuned model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graftc.applications.demo.chat import Chats
from graftc.applications.demo.data import evaluation_batches

if TYPE_CHECKING:
    from graftc.runtime.deploy.merged import Merged


BATCH = 32
"""The number of prompts in a batch."""


def onnx_generator(merged: Merged, path: Path) -> Any:
    """Export the merged model to the folder ``path``, and return the export loaded in ONNX Runtime."""
    from graftc.runtime.onnx_generation import load

    return load(merged.export(path, "onnx-generate"))


def greedy(
    model: Any,
    chats: Chats,
    new: int,
    *,
    least: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the tokens that a model generates after each prompt, up to the end of its turn.

    Decoding is greedy: each step chooses the most probable token.

    Args:
        model: a model with transformers' ``generate``.
        chats: the conversations with the prompts, which are padded on the left.
        new: the maximum number of new tokens.
        least: the minimum number of new tokens before the turn may end.
        on_batch: a function that is called after each batch with its number of prompts.
    """
    end = model.generation_config.eos_token_id
    continued: dict[int, list[int]] = {}
    with torch.no_grad():
        for rows, batch in evaluation_batches(chats, BATCH):
            out = model.generate(
                **batch, do_sample=False, max_new_tokens=new, min_new_tokens=least, pad_token_id=chats.pad
            )
            added = out[:, batch["input_ids"].shape[1] :].tolist()
            continued |= {i: _until(row, end) for i, row in zip(rows, added, strict=True)}
            if on_batch is not None:
                on_batch(len(rows))
    return [continued[i] for i in range(len(chats))]


def _until(row: list[int], end: int | Sequence[int]) -> list[int]:
    ends = [end] if isinstance(end, int) else end
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
