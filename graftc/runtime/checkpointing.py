"""Activation checkpointing by layer, as transformers models offer it."""

from __future__ import annotations

from typing import Any

from graftc.passes.core.blocks import LayerCode, Runner
from graftc.specs.diagnostics import GraftError


class Checkpointed(Runner):
    """The part of `Compiled` that recomputes activations."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """Recompute each Block's activations in the backward pass instead of keeping them."""
        for code in self._every_block():
            code.checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        for code in self._every_block():
            code.checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether Blocks recompute their activations."""
        blocks = list(self.blocks.values())
        return bool(blocks) and all(block._graftc.checkpointing for block in blocks)

    def _every_block(self) -> list[LayerCode]:
        if not self.blocks:
            name = self.module._get_name()  # type: ignore[no-untyped-call]
            raise GraftError("GC034", f"{name} has no repeated layers to checkpoint")
        return [block._graftc for block in self.blocks.values()]
