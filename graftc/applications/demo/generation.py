"""Text generation with the tuned model, in each of its forms."""

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
"""The number of prompts that are continued at once."""


def onnx_generator(merged: Merged, path: Path) -> Any:
    """Export the merged model to the folder ``path``, and return it loaded in ONNX Runtime."""
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
    """Return the tokens with which a model continues each prompt, up to the end of its turn.

    At each step the most probable token is taken.

    Args:
        model: a model with transformers' ``generate``.
        chats: conversations with the prompts, which are padded on the left.
        new: the largest number of tokens.
        least: the number of tokens before which the end of the turn is not allowed.
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
