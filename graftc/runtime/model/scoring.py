"""Log-probabilities of single tokens, for objectives that compare them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.lowering.token_losses import token_losses
from graftc.runtime.model.runner import ModelRunner
from graftc.specs.errors.diagnostics import GraftError


class Scoring(ModelRunner):
    """The part of `Compiled` that scores tokens."""

    def token_log_probs(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log-probability of every label where it is predicted, float32 or better, ``[batch, sequence]``; 0
        where there is no label. In causal language models the entry at a position is of the token behind it.

        Arguments are those of a call with ``labels``. Adapted heads, caps and scales of logits count. Logits are made a
        few rows at a time, whatever ``memory`` says, wherever `memory: {loss: chunked}` could be. There are gradients;
        inside of `disabled` it is the base that scores.

        Raises:
            GraftError: GC073 without labels, GC031 where the model has no loss over tokens.
        """
        labels = self._interface.named(args, kwargs).get("labels")
        if labels is None:
            raise GraftError("GC073", "token_log_probs needs labels", hint="labels=ids, with -100 where none counts")
        losses: Tensor = self.within(lambda: self._run(args, kwargs, "losses"))
        return -losses.view(len(labels), -1)

    def _program_of(self, key: ProgramKey) -> Program:
        if key.entry == "losses":
            return token_losses(self._program_of(key._replace(entry="forward")))
        return super()._program_of(key)
