"""Activation checkpointing by layer, with the interface of transformers models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch.utils.checkpoint import checkpoint

from graftc.compat.modules import printed_kind
from graftc.runtime.model.blocks import Recompute
from graftc.runtime.model.feature import Feature
from graftc.specs.errors.diagnostics import GraftError, nearest

_DEFAULTS = {name: p.default for name, p in inspect.signature(checkpoint).parameters.items()}
_OPTIONS = [*(n for n, default in _DEFAULTS.items() if default is not inspect.Parameter.empty), "preserve_rng_state"]
"""Keyword arguments of `torch.utils.checkpoint.checkpoint`; it reads the last of these from its ``**kwargs``."""


class Checkpointing(Feature):
    """Switches the recomputation of activations on and off."""

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each Block's activations in the backward pass instead of storing them.

        Args:
            activation_checkpointing_kwargs: keyword arguments of `torch.utils.checkpoint.checkpoint`. ``use_reentrant``
                is always False, so the inputs of layers need not require gradients.
            every_n_layers: the interval between recomputed layers: only the first of every ``every_n_layers`` layers is
                recomputed.
            offload: whether to store the tensors needed for recomputation in host memory.

        Raises:
            GraftError: GC034 if the model has no repeated layers, GC072 for an unsupported option or value.
        """
        # As in transformers: a wrapper around the older name, such as TRL's selective recomputation, stays in effect.
        enable = vars(self.runner.module).get("gradient_checkpointing_enable", self._enable)
        enable(activation_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload)

    def _enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None, every_n_layers: int, offload: bool
    ) -> None:
        options = dict(activation_checkpointing_kwargs or {})
        for option in options:
            if option not in _OPTIONS:
                close = nearest(option, _OPTIONS) or list(_OPTIONS)
                raise GraftError("GC072", f"checkpointing has no option {option!r}", hint=f"use {close[0]!r}")
        if options.pop("use_reentrant", None):
            message = "reentrant checkpointing (use_reentrant=True) is not supported"
            raise GraftError("GC072", message, hint='pass {"use_reentrant": False}, or leave it out')
        every: Any = every_n_layers
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            message = f"every_n_layers is {every_n_layers!r}"
            raise GraftError("GC072", message, hint="pass 1 to recompute every layer, 2 for every second layer")
        if not self.runner.blocks:
            name = printed_kind(self.runner.module)
            raise GraftError("GC034", f"{name} has no repeated layers to checkpoint")
        self.runner.recompute = Recompute(options, bool(offload)), every_n_layers
        self.runner.tell_blocks()

    def activation_checkpointing_disable(self) -> None:
        """Store activations for the backward pass again, instead of recomputing them."""
        self.runner.recompute = None
        self.runner.tell_blocks()

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Do the same as `activation_checkpointing_enable`, under transformers' older name."""
        own = vars(self.runner.module)
        enable = own.get("activation_checkpointing_enable", self._enable)
        if "gradient_checkpointing_enable" in own:  # the caller is the wrapper around this method
            enable = self._enable
        enable(gradient_checkpointing_kwargs, every_n_layers=every_n_layers, offload=offload)

    gradient_checkpointing_disable = activation_checkpointing_disable
    """The older name in transformers."""

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether Blocks recompute their activations."""
        return self.runner.recompute is not None

    is_gradient_checkpointing = is_activation_checkpointing
    """The older name in transformers."""
