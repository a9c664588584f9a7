"""Log-probabilities of single tokens, for objectives that compare them, TRL's among these."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from graftc.passes.core.ir.program_key import Entry
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.training.repeated import outputs_of
from graftc.specs.errors.diagnostics import GraftError

FUSED = "fused_lm_head"
"""With this argument the forward that TRL puts in the place of a model's gives log-probabilities in place of logits."""

_IGNORED = -100
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""What TRL calls the columns of `head_scores`."""


class TokenScoring:
    """Scores the tokens of texts.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    def token_log_probs(self, *args: Any, **kwargs: Any) -> Tensor:
        """The log-probability of every label where it is predicted, float32 or better, ``[batch, sequence]``; 0 where
        there is no label. In causal language models the entry at a position is of the token behind it.

        Arguments are those of a call with ``labels``. Adapted heads, caps and scales of logits count. Logits are made a
        few rows at a time, whatever ``memory`` says, wherever `memory: {loss: chunked}` could be. There are gradients;
        inside of `disabled` it is the base that scores.

        Raises:
            GraftError: GC073 without labels, GC031 where the model has no loss over tokens.
        """
        labels = self.runner.interface.named(args, kwargs).get("labels")
        if labels is None:
            raise GraftError("GC073", "token_log_probs needs labels", hint="labels=ids, with -100 where none counts")
        losses: Tensor = self.runner.within(lambda: self.runner.respond(args, kwargs, "losses"))
        return -losses.view(len(labels), -1)

    def fused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: tuple[str, ...]) -> dict[str, Any] | None:
        """What TRL's forward gives with `FUSED`, by field; None for a call that it had better answer itself.

        Args:
            args, kwargs: of the call.
            wanted: fields of single tokens.
        """
        given = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        labels, count = given.get("labels"), kwargs.get("num_items_in_batch")
        routers = given.get("output_router_logits") or getattr(self.runner.config, "output_router_logits", False)
        if labels is None or given.get("shift_labels") is not None or routers:
            return None
        entry: Entry = "scores" if {*wanted} & {*_STATISTICS} else "losses"
        found = self.runner.within(lambda: self.runner.respond(args, given, entry))
        found = found if isinstance(found, tuple) else (found,)
        executables = self.runner.shown.executables
        shifts = {outputs_of(each).shift for key, each in executables.items() if key.entry == entry}
        if (len(found) == 1 and entry == "scores") or found[0].numel() != labels.numel() or shifts != {1}:
            return None
        losses, *scores = (t.view(*labels.shape, *t.shape[1:])[:, :-1] for t in found)
        mask = labels[:, 1:] != _IGNORED
        loss = losses.sum() / (mask.sum().clamp(min=1) if count is None else count)
        fields = {name: scores[0][..., at] for at, name in enumerate(_STATISTICS) if name in wanted}
        if "is_top1" in fields:
            fields["is_top1"] = fields["is_top1"] > 0
        return {"loss": loss, "log_probs": -losses, "label_mask": mask, **fields}


def answering(runner: AdaptedRunner, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that is put in the place of a model's, with answers of our own to `FUSED` where it is TRL's.

    TRL's gives gradients of entropies, and takes a temperature and a head in float32. Where it was made for these, or
    is not as it is known, it stays as it is.

    Args:
        runner: of the model.
        forward: what is put there.
    """
    function = getattr(forward, "__func__", None)
    code = getattr(function, "__code__", None)
    if function is None or code is None or FUSED not in code.co_varnames:
        return forward
    held = inspect.getclosurevars(function)
    wanted: Any = held.nonlocals.get("outputs")
    output: Any = held.globals.get("FusedCausalLMOutput")
    plain = held.nonlocals.get("temperature") == 1 and held.nonlocals.get("cast_lm_head_to_fp32") is False
    known = isinstance(wanted, tuple) and {*wanted} <= {"log_probs", *_STATISTICS} and output is not None
    # Whoever asks for entropies beside other metrics has them for a metric; objectives ask for them alone.
    if not known or not plain or set(wanted) == {"log_probs", "entropy"}:
        return forward

    @wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(FUSED):
            own = {name: value for name, value in kwargs.items() if name != FUSED and value is not None}
            if (fields := TokenScoring(runner).fused(args, own, wanted)) is not None:
                return output(**fields)
        return forward(*args, **kwargs)

    return answer
