"""Check the first optimiser steps for tensors that have no gradient or do not move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graftc.compat.hooks import has_step_hooks
from graftc.compiler.inspect.trained import TrainedTensor, trained_tensors
from graftc.passes.core.weights.sharding import local
from graftc.runtime.model.root import Runner
from graftc.runtime.model.runner import runner_of
from graftc.specs.compose import Bank
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, warn

SAMPLE = 256
"""The number of entries per tensor, those with the largest gradients, that are watched for movement."""

_ABSENT = "is in no optimiser"
_FROZEN = "has been frozen since the optimiser was created"
_UNREACHED = "had no gradient: the loss does not depend on it, or was computed without gradients"
_ZERO = "had only zero gradients"
_INFINITE = "had a gradient that is not finite"
_STOPPED = "did not move: its group has a learning rate of 0"
_UNMOVED = "did not move, although it had a gradient: something resets its values, or the optimiser skips it"
_ROUNDED = "lost most of its step to rounding: {dtype} is too narrow for steps of this size"


@dataclass
class _Seen:
    """The observations for one tensor.

    Attributes:
        item: the tensor.
        gradient, moved: whether it has had a non-zero gradient, and whether it has moved.
        wrong: the problem at the last step; empty if there was none.
        sure: whether the problem is certain, so that later steps cannot resolve it.
        entries, before: the observed entries, and their values before the step.
        visible: whether plain gradient descent would have moved any of these entries.
    """

    item: TrainedTensor
    gradient: bool = False
    moved: bool = False
    wrong: str = ""
    sure: bool = False
    entries: Tensor | None = None
    before: Tensor | None = None
    visible: bool = False


@dataclass
class Watch:
    """A check of the first training steps, started by `watch`.

    Attributes:
        findings: the problems found so far, by the tensors' names in the Store.
        done: whether the check has ended.
    """

    findings: dict[str, str] = field(default_factory=dict)
    done: bool = False
    _seen: list[_Seen] = field(default_factory=list, repr=False)
    _banks: list[tuple[str, ...]] = field(default_factory=list, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)
    _left: int = 0
    _present: Callable[[], set[int]] = field(default=set, repr=False)
    _optimizers: Sequence[Optimizer] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for optimizer in self._optimizers:
            last = optimizer is self._optimizers[-1]
            self._hooks += [
                optimizer.register_step_pre_hook(self._begin),
                optimizer.register_step_post_hook(lambda *_, last=last: self._after(last)),
            ]

    @property
    def watched(self) -> int:
        """The number of tensors that are observed."""
        return len(self._seen)

    def remove(self) -> None:
        """End the check without a warning. The check ends automatically after its last step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()
        self._optimizers, self.done = (), True

    def _begin(
        self, turn: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Inspect gradients before the step or, if the step has a closure, after the closure's first call."""
        place = "closure" in kwargs
        closure = kwargs.get("closure") if place else next(iter(args[1:]), None)
        if not callable(closure):
            self._before(turn)
            return None
        calls = 0

        def looked_at() -> Any:
            nonlocal calls
            loss = closure()
            calls += 1
            if calls == 1:
                self._before(turn)
            return loss

        return (args, {**kwargs, "closure": looked_at}) if place else ((args[0], looked_at, *args[2:]), kwargs)

    @torch.no_grad()
    def _before(self, turn: Optimizer) -> None:
        groups = {id(p): group for o in self._optimizers for group in o.param_groups for p in group["params"]}
        stepped = {id(p) for group in turn.param_groups for p in group["params"]}
        for seen in self._seen:
            tensor = seen.item.tensor
            group = groups.get(id(tensor))
            seen.entries = seen.before = None
            if group is None:
                seen.wrong, seen.sure = _ABSENT, True
            elif id(tensor) in stepped:
                seen.wrong, seen.sure = _problem(seen, group)

    @torch.no_grad()
    def _after(self, last: bool) -> None:
        for seen in self._seen:
            if seen.entries is not None and seen.before is not None:
                _compare(seen)
        if last:
            self._left -= 1
            self._tell()

    def _tell(self) -> None:
        """Warn about certain problems and, after the last step, about all problems."""
        ended = self._left <= 0
        present = self._present()
        wrong = [s for s in self._seen if s.wrong and (s.sure or ended) and id(s.item.tensor) in present]
        problems = {s.item.name: s.wrong for s in wrong if not self._excused(s)}
        new = {name: text for name, text in problems.items() if name not in self.findings}
        self.findings |= new
        if new:
            _warn(new, len(self._seen))
        if ended:
            self.remove()

    def _excused(self, seen: _Seen) -> bool:
        """Return whether a tensor may lack a gradient.

        It may if its method declares the tensor inert at first, if no call has chosen its slot, or if its gradient is
        zero because another tensor of the adaptation does not move at a learning rate of 0.
        """
        if seen.wrong not in (_ZERO, _UNREACHED):
            return False
        owner = seen.item.adaptation
        if seen.wrong == _ZERO and any(s.wrong == _STOPPED for s in self._seen if s.item.adaptation == owner):
            return True
        bank = next((members for members in self._banks if owner in members), ())
        return seen.item.inert or any(s.gradient for s in self._seen if s.item.adaptation in bank)


def watch(compiled: nn.Module | Runner, *optimizers: Optimizer, steps: int = 3) -> Watch:
    """Observe the first optimiser steps, and warn (GC059) about tensors that should train but do not.

    A tensor is reported if none of the optimisers contains it; if it has no gradient (reported at once) or only zero
    gradients (in all steps: LoRA's B starts as zeros, so A's gradient is zero in the first step); or if it does not
    move, because its learning rate is 0 (in all steps if a schedule may warm up) or because the step is lost when
    rounding to 16 bits. Tensors that a method declares inert at first are excused, as are slots of a bank that no call
    has chosen. At each step, the entries with the largest gradients are compared before and after; the check removes
    itself after the last step.

    Args:
        compiled: a compiled model. Tensors that are currently frozen (`Compiled.train_only`) are not observed.
        optimizers: all optimisers that train it, or wrappers around them with an attribute ``optimizer``, such as
            Accelerate's.
        steps: the number of steps to observe, counted by the last optimiser.

    Returns:
        The check: ``findings`` contains the problems found so far, ``remove()`` ends it.

    Raises:
        GraftError: GC073 if there is no optimiser with torch's interface, or ``steps`` is below 1.
    """
    if steps < 1:
        raise GraftError("GC073", f"steps is {steps!r}", hint="pass the number of steps to observe, at least 1")
    if not optimizers or not all(map(is_plain, optimizers)):
        other = next((kind_of(each) for each in optimizers if not is_plain(each)), "none")
        hint = "pass optimisers with torch's interface: graftc.optim.watch(compiled, optimizer)"
        raise GraftError("GC073", f"the optimiser is {other}", hint=hint)
    plain = [_unwrapped(optimizer) for optimizer in optimizers]
    runner = runner_of(compiled)
    return Watch(
        _seen=[_Seen(item) for item in trained_tensors(runner.compilation)],
        _banks=[tuple(c.members) for c in runner.spec.compose if isinstance(c, Bank)],
        _left=steps,
        _present=lambda: {id(tensor) for _, tensor in runner.store.adapters()},
        _optimizers=plain,
    )


def is_plain(optimizer: Any) -> bool:
    """Return whether an optimiser, or the optimiser inside a wrapper, has torch's interface."""
    return isinstance(_unwrapped(optimizer), Optimizer)


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimiser inside any wrappers; Accelerate's wrappers are optimisers without step hooks."""
    while not has_step_hooks(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _problem(seen: _Seen, group: dict[str, Any]) -> tuple[str, bool]:
    """Return a tensor's problem before its step, and whether the problem is certain.

    If no problem is visible yet, record the entries that the step should move, and return the previous problem.
    """
    tensor, gradient = local(seen.item.tensor), seen.item.tensor.grad
    if not seen.item.tensor.requires_grad:
        return _FROZEN, True
    if gradient is None:
        return "" if seen.gradient else _UNREACHED, not seen.gradient
    flat = local(gradient.coalesce().to_dense() if gradient.is_sparse else gradient).reshape(-1)
    size = flat.abs()
    largest = size.topk(min(SAMPLE, size.numel()))
    if not bool(torch.isfinite(largest.values).all()):
        return _INFINITE, False
    entries = largest.indices[largest.values > 0]
    if not entries.numel():
        shard = tensor is not seen.item.tensor  # other processes' shards may have a non-zero gradient
        return "" if seen.gradient or shard else _ZERO, False
    seen.gradient = True
    if float(group["lr"]) == 0:
        return "" if seen.moved else _STOPPED, "initial_lr" not in group
    before = tensor.detach().reshape(-1)[entries]
    seen.entries, seen.before = entries, before
    # While B is small, so is A's gradient: unless the optimiser scales it, the step may be lost in float32.
    seen.visible = bool((before - float(group["lr"]) * flat[entries].to(before.dtype) != before).any())
    return seen.wrong, seen.sure


def _compare(seen: _Seen) -> None:
    """Compare a tensor's observed entries with their values before the step."""
    assert seen.entries is not None and seen.before is not None
    tensor = local(seen.item.tensor).detach().reshape(-1)
    moved = int((tensor[seen.entries] != seen.before).sum())
    narrow = tensor.element_size() < 4
    if not moved and not narrow:
        seen.wrong = _UNMOVED if seen.visible and not seen.moved else ""
    elif narrow and 2 * moved < seen.entries.numel():
        seen.wrong = _ROUNDED.format(dtype=str(tensor.dtype).removeprefix("torch."))
    else:
        seen.wrong = ""
    seen.moved = seen.moved or moved > 0
    seen.sure = False
    seen.entries = seen.before = None


def _warn(messages: dict[str, str], of: int) -> None:
    reasons: dict[str, list[str]] = {}
    for name, text in messages.items():
        reasons.setdefault(text, []).append(name)
    details = [f"{_some(names)}: {text}" for text, names in reasons.items()]
    hints = [hint for text, hint in _HINTS.items() if any(reason.startswith(text) for reason in reasons)]
    message = f"{len(messages)} of {of} tensors that should train do not"
    warn("GC059", message, hint="\n".join(hints) or None, details=details)


def _some(names: Sequence[str], few: int = 3) -> str:
    return ", ".join(names[:few]) + (f" and {len(names) - few} more" if len(names) > few else "")


_HINTS = {
    _ABSENT: "create the optimiser from graftc.optim.param_groups(compiled, lr), after compiling and sharding",
    _FROZEN: "compiled.train_only() lets all adaptations train",
    _UNREACHED: "call loss.backward() on the compiled model's own outputs, outside of no_grad() and disabled()",
    _STOPPED: "check the learning rates in optimizer.param_groups",
    _ROUNDED.partition("{")[0]: "keep trained tensors in float32, or raise the learning rate",
}
