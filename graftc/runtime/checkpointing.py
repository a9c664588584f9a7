"""Activation checkpointing by layer, as transformers models offer it."""

from __future__ import annotations

from typing import Any

from graftc.passes.core.blocks import Runner
from graftc.specs.diagnostics import GraftError


class Checkpointed(Runner):
    """The part of `Compiled` that recomputes activations."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recompute each Block's activations in the backward pass instead of keeping them."""
        for block in self._every_block():
            block.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for block in self._every_block():
            block.checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether Blocks recompute their activations."""
        blocks = list(self.blocks.values())
        return bool(blocks) and all(block.checkpointing for block in blocks)

    def _every_block(self) -> list[Any]:
        if not self.blocks:
            name = self._get_name()  # type: ignore[no-untyped-call]
            raise GraftError("GC034", f"{name} has no repeated layers to checkpoint")
        return list(self.blocks.values())
