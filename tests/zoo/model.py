"""The definition of a small model of the zoo, and what several share: sizes, special tokens, batches of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 300
IMAGE, VIDEO, START, END = 250, 251, 252, 253
LANGUAGE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
LAYERS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PATCHES: dict[str, Any] = {**LAYERS, "image_size": 56, "patch_size": 14}
CLIP_VISION: dict[str, Any] = {
    **PATCHES,
    "model_type": "clip_vision_model",
    "num_hidden_layers": 3,
    "projection_dim": 64,
}
SIGLIP_VISION: dict[str, Any] = {
    **PATCHES,
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 3,
    "vision_use_head": False,
}


def _queries_and_values() -> dict[str, Any]:
    return {"role": ["attn.q", "attn.v"]}


@dataclass(frozen=True)
class Small:
    """A model in eval mode and two batches of different structure.

    Attributes:
        generates: whether to try `generate` with the batches.
        target: what to adapt, as in the ``target`` of a spec.
        fallback: a glob of modules to adapt if the roles of `target` do not exist.
    """

    model: nn.Module
    first: dict[str, Any]
    second: dict[str, Any]
    generates: bool = False
    target: dict[str, Any] = field(default_factory=_queries_and_values)
    fallback: str = "**.{q_proj,v_proj}"


def built(kind: Callable[[Any], nn.Module], config: object) -> nn.Module:
    """Return a model in eval mode, with the same weights each time; the caller's random state stays unchanged."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return kind(config).eval()


def noise(seed: int, *shape: int) -> Tensor:
    """Return normally distributed random numbers, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, *shape: int, low: int = 5, high: int = 200) -> Tensor:
    """Return random integers from `low` to below `high`, the same for the same seed."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def reaching(lengths: Sequence[int], longest: int) -> Tensor:
    """Return a mask with a row for each length, with that many ones followed by zeros."""
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


def texts(rows: Sequence[tuple[Sequence[int], int]], seed: int, enclosed: bool = False) -> dict[str, Any]:
    """Return token ids, padded in front, with a mask and labels.

    Args:
        rows: the number of tokens of each image or sound of a row, and the number of words after them.
        seed: the seed of the words.
        enclosed: whether each image is between a start and an end token.
    """
    generator = torch.Generator().manual_seed(seed)
    before, after = ([START], [END]) if enclosed else ([], [])
    written: list[list[int]] = []
    for images, words in rows:
        shown = [token for count in images for token in (*before, *([IMAGE] * count), *after)]
        written.append([1, *shown, *torch.randint(10, 200, (words,), generator=generator).tolist()])
    longest = max(map(len, written))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in written])
    mask = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (ids >= IMAGE), -100)}
