"""Log-probabilities of individual tokens, for objectives that compare them, such as TRL's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from torch import Tensor

from graftc.compat.trl import FUSED, fused_forward
from graftc.passes.core.ir.program_key import Entry
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.feature import Feature
from graftc.runtime.training.repeated import outputs_of
from graftc.specs.errors.diagnostics import GraftError

_IGNORED = -100
_STATISTICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""TRL's names for the columns of `head_scores`."""


class TokenScoring(Feature):
    """Scores the tokens of texts."""

    def token_log_probs(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the log-probability of every label at the position that predicts it, ``[batch, sequence]``.

        Values are in float32 or wider, and 0 where there is no label. In causal language models, the entry at a
        position belongs to the next token.

        The arguments are those of a call with ``labels``. Adapted heads, logit caps and logit scales are taken into
        account. Wherever `memory: {loss: chunked}` is possible, logits are computed a few rows at a time, whatever the
        spec's ``memory``. Gradients are supported; inside `disabled`, the scores are those of the base.

        Raises:
            GraftError: GC073 without labels, GC031 if the model has no loss over tokens.
        """
        labels = self.runner.interface.named(args, kwargs).get("labels")
        if labels is None:
            raise GraftError("GC073", "token_log_probs needs labels", hint="pass labels=ids, with -100 where to ignore")
        losses: Tensor = self.runner.within(lambda: self.runner.respond(args, kwargs, "losses"))
        return -losses.view(len(labels), -1)

    def fused(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], wanted: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the fields that TRL's forward returns with `FUSED`; None for a call that TRL has to answer itself.

        Args:
            args: the positional arguments of the call.
            kwargs: the keyword arguments of the call.
            wanted: the names of the per-token fields to return.
        """
        given = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        labels, count = given.get("labels"), kwargs.get("num_items_in_batch")
        routers = given.get("output_router_logits") or getattr(self.runner.config, "output_router_logits", False)
        if labels is None or given.get("shift_labels") is not None or routers:
            return None
        entry: Entry = "scores" if {*wanted} & {*_STATISTICS} else "losses"
        outputs = self.runner.within(lambda: self.runner.respond(args, given, entry))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        shifts = {outputs_of(each).shift for key, each in self.runner.shown.executables.items() if key.entry == entry}
        if (len(outputs) == 1 and entry == "scores") or outputs[0].numel() != labels.numel() or shifts != {1}:
            return None
        losses, *scores = (t.view(*labels.shape, *t.shape[1:])[:, :-1] for t in outputs)
        mask = labels[:, 1:] != _IGNORED
        loss = losses.sum() / (mask.sum().clamp(min=1) if count is None else count)
        fields = {name: scores[0][..., at] for at, name in enumerate(_STATISTICS) if name in wanted}
        if "is_top1" in fields:
            fields["is_top1"] = fields["is_top1"] > 0
        return {"loss": loss, "log_probs": -losses, "label_mask": mask, **fields}


def answering(runner: AdaptedRunner, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward to set on a model: if ``forward`` is TRL's, graftc answers calls with `FUSED`.

    TRL's forward supports gradients of entropies, a temperature and a head in float32. If it was created for these, or
    does not have the expected form, it is returned unchanged.

    Args:
        runner: the Runner of the model.
        forward: the forward that a caller sets on the model.
    """
    fused = fused_forward(forward)
    if fused is None or not fused.plain or not {*fused.fields} <= {"log_probs", *_STATISTICS}:
        return forward
    # An objective requests no metrics besides entropies; together with other metrics, entropies are only a metric.
    if {*fused.fields} == {"log_probs", "entropy"}:
        return forward

    @wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get(FUSED):
            options = {name: value for name, value in kwargs.items() if name != FUSED and value is not None}
            if (fields := TokenScoring(runner).fused(args, options, fused.fields)) is not None:
                return fused.output(**fields)
        return forward(*args, **kwargs)

    return answer
