"""A check of the first optimiser steps: which tensors had no gradient, or did not move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graftc.compiler.inspect.trained import TrainedTensor, trained_tensors
from graftc.passes.core.weights.sharding import local
from graftc.runtime.model.root import Runner
from graftc.runtime.model.runner import runner_of
from graftc.specs.compose import Bank
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, warn

SAMPLE = 256
"""Of how many entries of a tensor, those with the largest gradients, it is seen whether they move."""

_ABSENT = "is in no optimiser"
_FROZEN = "has been frozen since the optimiser was made"
_UNREACHED = "had no gradient: the loss does not depend on it, or was computed without gradients"
_ZERO = "had a gradient of zeros only"
_INFINITE = "had a gradient that is not finite"
_STOPPED = "did not move: its group has a learning rate of 0"
_HELD = "did not move, although it had a gradient: something holds its values, or the optimiser passes it over"
_ROUNDED = "lost most of its step to rounding: {dtype} is too narrow for steps of this size"


@dataclass
class _Seen:
    """What has been seen of a tensor.

    Attributes:
        item: which.
        gradient, moved: whether it has had one that is not zero, and has moved.
        wrong: what was wrong at the last step; empty where nothing was.
        sure: whether later steps can change nothing about that.
        entries, before: those that are looked at, and their values before the step.
        visible: whether plain descent would have moved one of them.
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
    """A check of the first steps of a training: see `watch`.

    Attributes:
        findings: what is wrong, by the Store names of the tensors; empty at first, and where nothing is.
        done: whether it has ended.
    """

    findings: dict[str, str] = field(default_factory=dict)
    done: bool = False
    _seen: list[_Seen] = field(default_factory=list, repr=False)
    _stages: list[str] = field(default_factory=list, repr=False)
    _banks: list[tuple[str, ...]] = field(default_factory=list, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)
    _left: int = 0
    _present: Callable[[], set[int]] = field(default=set, repr=False)

    @property
    def watched(self) -> int:
        """How many tensors are looked at."""
        return len(self._seen)

    def remove(self) -> None:
        """End the check without a word. It ends by itself after its last step."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()
        self.done = True

    def _begin(
        self, optimizers: Sequence[Optimizer], turn: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Look at gradients before the step; with a closure, when it has been called first."""
        place = "closure" in kwargs
        closure = kwargs.get("closure") if place else next(iter(args[1:]), None)
        if not callable(closure):
            self._before(optimizers, turn)
            return None
        calls = 0

        def looked_at() -> Any:
            nonlocal calls
            loss = closure()
            calls += 1
            if calls == 1:
                self._before(optimizers, turn)
            return loss

        return (args, {**kwargs, "closure": looked_at}) if place else ((args[0], looked_at, *args[2:]), kwargs)

    @torch.no_grad()
    def _before(self, optimizers: Iterable[Optimizer], turn: Optimizer) -> None:
        groups = {id(p): group for o in optimizers for group in o.param_groups for p in group["params"]}
        own = {id(p) for group in turn.param_groups for p in group["params"]}
        for seen in self._seen:
            tensor = seen.item.tensor
            group = groups.get(id(tensor))
            seen.entries = seen.before = None
            if group is None:
                seen.wrong, seen.sure = _ABSENT, True
            elif id(tensor) in own:
                _look(seen, group)

    @torch.no_grad()
    def _after(self, turn: Optimizer, last: bool) -> None:
        for seen in self._seen:
            if seen.entries is not None and seen.before is not None:
                _compare(seen)
        if last:
            self._left -= 1
            self._tell()

    def _tell(self) -> None:
        """Warn of what is sure, and after the last step of all that is wrong."""
        ended = self._left <= 0
        present = self._present()
        wrong = [s for s in self._seen if s.wrong and (s.sure or ended) and id(s.item.tensor) in present]
        found = {s.item.name: s.wrong for s in wrong if not self._excused(s)}
        new = {name: text for name, text in found.items() if name not in self.findings}
        self.findings |= new
        if new:
            _warn(new, len(self._seen))
        if ended:
            self.remove()

    def _excused(self, seen: _Seen) -> bool:
        """Whether a method says that a tensor may be without a gradient at first, or no call has chosen its slot; or
        whether zeros come of another tensor of the adaptation that stands still at a rate of 0."""
        if seen.wrong not in (_ZERO, _UNREACHED):
            return False
        owner = seen.item.adaptation
        if seen.wrong == _ZERO and any(s.wrong == _STOPPED for s in self._seen if s.item.adaptation == owner):
            return True
        bank = next((members for members in self._banks if owner in members), ())
        return seen.item.inert or any(s.gradient for s in self._seen if s.item.adaptation in bank)


def watch(compiled: nn.Module | Runner, *optimizers: Optimizer, steps: int = 3) -> Watch:
    """Look at the first optimiser steps, and warn (GC059) of tensors that train in name only.

    These are tensors that are in none of the optimisers, that have no gradient (at once) or one of zeros only (in all
    of the steps: B of LoRA starts as zeros, so that A has no gradient in the first one), and that do not move, because
    their learning rate is 0 (in all of the steps, where a schedule may warm up) or because the step is lost in rounding
    to 16 bits. What a method claims to be inert at first is passed over, and so are the slots of a bank that no call
    has chosen. At each step the entries with the largest gradients are compared; nothing is left after the last one.

    Args:
        compiled: a compiled model. Tensors that are frozen now (`Compiled.train_only`) are not looked at.
        optimizers: all optimisers that train it, or wrappers of them with an attribute ``optimizer``, as Accelerate's.
        steps: how many steps of the last optimiser are looked at.

    Returns:
        The check: ``findings`` has what was found so far, ``remove()`` ends it.

    Raises:
        GraftError: GC073 where there is no optimiser of torch's interface, and for ``steps`` below 1.
    """
    if steps < 1:
        raise GraftError("GC073", f"steps is {steps!r}", hint="give how many steps to look at, from 1")
    if not optimizers or not all(map(is_plain, optimizers)):
        other = next((kind_of(each) for each in optimizers if not is_plain(each)), "none")
        hint = "graftc.optim.watch(compiled, optimizer) takes optimisers of torch's interface"
        raise GraftError("GC073", f"the optimiser is {other}", hint=hint)
    plain = [_unwrapped(optimizer) for optimizer in optimizers]
    runner = runner_of(compiled)
    check = Watch(_left=steps)
    check._seen = [_Seen(item) for item in trained_tensors(runner.compilation)]
    check._banks = [tuple(c.members) for c in runner.spec.compose if isinstance(c, Bank)]
    check._present = lambda: {id(tensor) for _, tensor in runner.store.adapters()}
    for optimizer in plain:
        last = optimizer is plain[-1]
        check._hooks += [
            optimizer.register_step_pre_hook(lambda turn, args, kwargs: check._begin(plain, turn, args, kwargs)),
            optimizer.register_step_post_hook(lambda turn, *_, last=last: check._after(turn, last)),
        ]
    return check


def is_plain(optimizer: Any) -> bool:
    """Whether an optimiser, or what is in its wrapper, has the hooks of torch's."""
    return isinstance(_unwrapped(optimizer), Optimizer)


def _unwrapped(optimizer: Any) -> Any:
    """What is in a wrapper; those of Accelerate are optimisers without the hooks of one."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _look(seen: _Seen, group: dict[str, Any]) -> None:
    """What is to be seen of a tensor before the step that it is in."""
    tensor, gradient = local(seen.item.tensor), seen.item.tensor.grad
    if not seen.item.tensor.requires_grad:
        seen.wrong, seen.sure = _FROZEN, True
        return
    if gradient is None:
        seen.wrong, seen.sure = ("" if seen.gradient else _UNREACHED), not seen.gradient
        return
    flat = local(gradient.coalesce().to_dense() if gradient.is_sparse else gradient).reshape(-1)
    size = flat.abs()
    largest = size.topk(min(SAMPLE, size.numel()))
    if not bool(torch.isfinite(largest.values).all()):
        seen.wrong, seen.sure = _INFINITE, False
        return
    entries = largest.indices[largest.values > 0]
    if not entries.numel():
        shard = tensor is not seen.item.tensor  # the other processes' parts may have one
        seen.wrong, seen.sure = ("" if seen.gradient or shard else _ZERO), False
        return
    seen.gradient = True
    if float(group["lr"]) == 0:
        scheduled = "initial_lr" in group
        seen.wrong, seen.sure = ("" if seen.moved else _STOPPED), not scheduled
        return
    before = tensor.detach().reshape(-1)[entries]
    seen.entries, seen.before = entries, before
    # While B is small, so is the gradient of A: without an optimiser that scales it, the step may be lost in float32.
    seen.visible = bool((before - float(group["lr"]) * flat[entries].to(before.dtype) != before).any())


def _compare(seen: _Seen) -> None:
    """What has become of the entries of a tensor that are looked at."""
    assert seen.entries is not None and seen.before is not None
    tensor = local(seen.item.tensor).detach().reshape(-1)
    moved = int((tensor[seen.entries] != seen.before).sum())
    narrow = tensor.element_size() < 4
    if not moved and not narrow:
        seen.wrong = _HELD if seen.visible and not seen.moved else ""
    elif narrow and 2 * moved < seen.entries.numel():
        seen.wrong = _ROUNDED.format(dtype=str(tensor.dtype).removeprefix("torch."))
    else:
        seen.wrong = ""
    seen.moved = seen.moved or moved > 0
    seen.sure = False
    seen.entries = seen.before = None


def _warn(found: dict[str, str], of: int) -> None:
    reasons: dict[str, list[str]] = {}
    for name, text in found.items():
        reasons.setdefault(text, []).append(name)
    few = 3
    details = [f"{', '.join(names[:few])}{_more(names, few)}: {text}" for text, names in reasons.items()]
    message = f"{len(found)} of {of} tensors that should train do not"
    warn("GC059", message, hint=_hint(reasons), details=details)


def _more(names: list[str], few: int) -> str:
    return f" and {len(names) - few} more" if len(names) > few else ""


def _hint(reasons: Iterable[str]) -> str | None:
    found = [hint for text, hint in _HINTS.items() if any(r.startswith(text) for r in reasons)]
    return "\n".join(found) or None


_HINTS = {
    _ABSENT: "make the optimiser of graftc.optim.param_groups(compiled, lr), after compiling and sharding",
    _FROZEN: "compiled.train_only() lets all adaptations train",
    _UNREACHED: "call loss.backward() on the compiled model's own outputs, outside of no_grad() and disabled()",
    _STOPPED: "look at the learning rates of optimizer.param_groups",
    _ROUNDED.partition("{")[0]: "keep what trains in float32, or raise the learning rate",
}
