"""A LoRA adapter as plain updates to a base's maps, independent of its file's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graftc.specs.errors.diagnostics import GraftError

EXPERT = re.compile(r"(?P<module>.*\bexperts)\.(?P<map>gate_proj|up_proj|down_proj)")
"""Matches the path of one projection of all experts in a layer."""


@dataclass(frozen=True)
class Update:
    """The update ``scale * up @ down`` to one map, or to the maps of all experts along a leading axis.

    The shapes are ``down: [..., rank, in]`` and ``up: [..., out, rank]``.

    Attributes:
        down, up: the factors, in their stored dtype.
        scale: the scalar by which their product is multiplied.
        table: whether the map is an embedding table, whose columns correspond to tokens.
    """

    down: Tensor
    up: Tensor
    scale: float
    table: bool = False

    def __post_init__(self) -> None:
        fits = self.down.shape[:-2] == self.up.shape[:-2] and self.down.shape[-2] == self.up.shape[-1]
        if self.down.dim() not in (2, 3) or not fits:
            raise ValueError(f"the shapes of A {list(self.down.shape)} and B {list(self.up.shape)} do not match")

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return self.up.shape[-1]

    @property
    def rows(self) -> int:
        """The number of outputs of the map."""
        return self.up.shape[-2]

    @property
    def experts(self) -> int | None:
        """The number of experts; None for a single map."""
        return self.up.shape[0] if self.up.dim() == 3 else None

    def scaled(self, scale: float) -> Update:
        """Return the same update with another scale; ``up`` absorbs the difference, rounded to its dtype."""
        if scale == self.scale:
            return self
        up = (self.up.double() * (self.scale / scale)).to(self.up.dtype)
        return replace(self, up=up, scale=scale)

    def padded(self, rank: int) -> Update:
        """Return the same update, padded with zeros up to a rank."""
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return self if more <= 0 else replace(self, down=pad(self.down, (0, 0, 0, more)), up=pad(self.up, (0, more)))

    def beside(self, other: Update) -> Update:
        """Return the sum of two updates: factors side by side, with this update's scale and the wider dtype."""
        dtype = torch.promote_types(self.up.dtype, other.up.dtype)
        other = replace(other, down=other.down.to(dtype), up=other.up.to(dtype)).scaled(self.scale)
        down = torch.cat([self.down.to(dtype), other.down], -2)
        return replace(self, down=down, up=torch.cat([self.up.to(dtype), other.up], -1))

    def trimmed(self) -> Update:
        """Return the same update without the ranks whose column of ``up`` is all zeros; at least one rank remains."""
        used = self.up.flatten(0, -2).ne(0).any(0)
        if bool(used.all()):
            return self
        if not bool(used.any()):
            used[0] = True
        return replace(self, down=self.down[..., used, :], up=self.up[..., used])


@dataclass(frozen=True)
class PlainAdapter:
    """A LoRA adapter, keyed by its maps' paths in the transformers model.

    Attributes:
        updates: updates by path. Experts have one update per projection, ``<...>.experts.gate_proj``, with the
            experts as its leading axis.
        about: config fields that every layout preserves: the base, its revision, the task.
        invocation: the tokens from whose last occurrence on an aLoRA acts; empty for a LoRA, which acts on all tokens.
    """

    updates: Mapping[str, Update]
    about: Mapping[str, Any] = field(default_factory=dict)
    invocation: tuple[int, ...] = ()

    @property
    def has_experts(self) -> bool:
        """Whether any of the adapter's maps belongs to experts."""
        return any(EXPERT.fullmatch(path) for path in self.updates)


@dataclass(frozen=True)
class AttentionSizes:
    """The sizes of a base's attention layers, on which rotary permutations and fused projections depend.

    Attributes:
        queries, keys: the number of query heads, and the number of key-value heads.
        size: number of outputs per head.
    """

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> AttentionSizes:
        """Read the sizes from a base's config.

        Raises:
            GraftError: GC069 if the config does not define them.
        """
        config = config.get("text_config", config)
        queries, hidden = config.get("num_attention_heads"), config.get("hidden_size")
        keys = config.get("num_key_value_heads") or queries
        if not all(isinstance(n, int) and n > 0 for n in (queries, keys, hidden)):
            hint = "name the base's folder: --model MODEL"
            raise GraftError("GC069", f"{where} does not define the number of attention heads", hint=hint)
        assert isinstance(queries, int) and isinstance(keys, int) and isinstance(hidden, int)
        return cls(queries, keys, int(config.get("head_dim") or hidden // queries))


def concatenated(first: PlainAdapter, second: PlainAdapter) -> PlainAdapter:
    """Return the sum of two adapters, with their factors side by side, so that their ranks add up.

    Raises:
        GraftError: GC069 if the sizes of a map differ.
    """
    updates = dict(first.updates)
    for path, other in second.updates.items():
        update = updates.get(path)
        if update is None:
            updates[path] = other
            continue
        if update.down.shape[:-2] != other.down.shape[:-2] or (update.down.shape[-1], update.rows) != (
            other.down.shape[-1],
            other.rows,
        ):
            raise GraftError("GC069", f"the adapters' maps have different sizes at {path}", hint="they need one base")
        updates[path] = update.beside(other)
    return PlainAdapter(updates, first.about)
