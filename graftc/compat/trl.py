"""The forward that TRL sets on the models that it trains, and the options that it was created with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

FUSED = "fused_lm_head"
"""The argument with which the forward returns log-probabilities of tokens instead of logits."""


class FusedForward(NamedTuple):
    """The options with which TRL created a forward method.

    Attributes:
        fields: the names of the per-token fields that it returns.
        plain: whether it uses a temperature of 1, and the head in its own dtype.
        output: the class of its outputs.
    """

    fields: tuple[str, ...]
    plain: bool
    output: Callable[..., Any]


def fused_forward(forward: Callable[..., Any]) -> FusedForward | None:
    """Return the options of a forward if it is one of TRL's; only the variables in its closure reveal them."""
    function = getattr(forward, "__func__", None)
    code = getattr(function, "__code__", None)
    if function is None or code is None or FUSED not in code.co_varnames:
        return None
    closure = inspect.getclosurevars(function)
    fields: Any = closure.nonlocals.get("outputs")
    output: Any = closure.globals.get("FusedCausalLMOutput")
    plain = closure.nonlocals.get("temperature") == 1 and closure.nonlocals.get("cast_lm_head_to_fp32") is False
    return FusedForward(fields, plain, output) if isinstance(fields, tuple) and output is not None else None
