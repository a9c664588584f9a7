"""Adaptations that no weight can contain, as they act on the eager model while a call runs: prefixes and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tools.campaign.blocks import ACTIVATIONS, Attention
from tools.campaign.reference import Fields, NoReferenceError, Tensors

PREFIXES = frozenset({"prefix", "p_tuning_v2"})
ADAPTERS = frozenset({"llm_adapters"})


@dataclass(frozen=True)
class Acting:
    """One adaptation at one module.

    Attributes:
        method: its method, one of `PREFIXES` or `ADAPTERS`.
        fields: the fields of its spec.
        path: the path of the module.
        tensors: its tensors by part.
    """

    method: str
    fields: Fields
    path: str
    tensors: Tensors


@contextmanager
def acting(model: nn.Module, adaptations: Sequence[Acting]) -> Iterator[None]:
    """Let adaptations act on a model within the block; afterwards it is as before.

    Raises:
        NoReferenceError: for keys and values that a network computes, an attention that is not the grammar's, and two
            adapters at one map.
    """
    with ExitStack() as stack:
        taken: set[str] = set()
        for each in adaptations:
            module = model.get_submodule(each.path)
            if each.method in PREFIXES:
                _prefix(module, each, stack)
                continue
            if each.path in taken:
                raise NoReferenceError("two adapters at one map")
            taken.add(each.path)
            _adapter(module, each, stack)
        yield


def _prefix(module: nn.Module, each: Acting, stack: ExitStack) -> None:
    if not isinstance(module, Attention):
        raise NoReferenceError(f"{each.method} outside of the grammar")
    if "keys" not in each.tensors:
        raise NoReferenceError(f"{each.method} with a network")
    before = module.prefixes
    stack.callback(setattr, module, "prefixes", before)
    module.prefixes = (*before, (each.tensors["keys"], each.tensors["values"]))


def _adapter(module: nn.Module, each: Acting, stack: ExitStack) -> None:
    """Add ``s U f(D x)``: to the input, to the output, or from the input to the output (`parallel`)."""
    t, placement = each.tensors, each.fields["placement"]
    activation = ACTIVATIONS[each.fields["activation"]]
    scale: Any = t.get("scale", each.fields["scale"])

    def added(x: Tensor) -> Tensor:
        result: Tensor = scale * F.linear(
            activation(F.linear(x, t["down"], t.get("down_bias"))), t["up"], t.get("up_bias")
        )
        return result

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (args[0] + added(args[0]), *args[1:]) if placement == "input" else None

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if placement == "input":
            return None
        return output + added(args[0] if placement == "parallel" else output)

    if placement == "series":
        raise NoReferenceError("an adapter whose place depends on the role of its map")
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)
