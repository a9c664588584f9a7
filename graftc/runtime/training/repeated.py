"""Several forward passes within one call, for objectives that compare their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graftc.compiler.capture.interface import COUNT
from graftc.compiler.capture.isolation import is_traced
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.root import Installed
from graftc.runtime.model.views import Progress, Waiting

aten = torch.ops.aten
LABELS = "labels"
IGNORED = -100
"""The label that transformers' losses leave out."""


@dataclass(frozen=True)
class Outputs:
    """What a train Program's flat outputs are to objectives.

    Attributes:
        names: of all.
        loss: which one is the loss; None where there is none.
        shift: how many positions after the one that predicts it a label stands.
        counted: whether the loss is the mean over the labels of the whole step, which the call is told.
    """

    names: tuple[str, ...]
    loss: int | None
    shift: int
    counted: bool = False


def outputs_of(executable: Installed) -> Outputs:
    """What the flat outputs of a train Program are to objectives."""
    return executable.once("outputs", _outputs)


def _outputs(program: Program) -> Outputs:
    names = program.outputs.names
    loss = names.index("loss") if "loss" in names else None
    return Outputs(names, loss, label_shift(program), _reads(program, COUNT))


class Repeating:
    """Runs a Program several times in one call, where objectives compare the passes.

    Args:
        runner: of the model.
        missed: is called when a term has gone without its gradient.
    """

    def __init__(self, runner: AdaptedRunner, missed: Callable[[], None]) -> None:
        self.runner, self._missed = runner, missed

    def results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """Flat outputs of the first pass, with the terms of the others in the loss where there is one."""
        runner = self.runner
        first = runner.run(key, present)
        objectives = runner.steering.outputs
        if not runner.training or not objectives or runner.base_only:
            return first
        if key.entry in ("losses", "scores"):  # there are no outputs to compare
            self._missed()
            return first
        count = max(objective.passes for objective in objectives.values())
        shape = outputs_of(runner.shown.executables[key])
        found = [_named(shape.names, first)]
        found += [_named(shape.names, runner.run(key, present)) for _ in range(count - 1)]
        counted = _counted(present.get(LABELS), shape.shift)
        terms = [objective.value(found[: objective.passes], counted) for objective in objectives.values()]
        term = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
        term = term * share(present, shape.shift) if shape.counted else term
        loss = first[shape.loss] if shape.loss is not None else None
        if isinstance(loss, Tensor) and loss.dim() == 0:
            assert shape.loss is not None
            return (*first[: shape.loss], loss + term.to(loss.dtype), *first[shape.loss + 1 :])
        if term.requires_grad:
            self._wait(term, first)
        return first

    def _wait(self, term: Tensor, outputs: tuple[Any, ...]) -> None:
        """Keep a term for the next `extra_loss`, until the passes that it belongs to have had their backward pass."""
        progress, missed = self.runner.progress, self._missed
        progress.waiting.append(term)
        if is_traced():
            return

        def gone(gradient: Tensor) -> None:
            if any(waiting is term for waiting in progress.waiting):
                progress.waiting[:] = [waiting for waiting in progress.waiting if waiting is not term]
                missed()

        own = next((t for t in outputs if isinstance(t, Tensor) and t.requires_grad), None)
        if own is not None:
            own.register_hook(gone)  # type: ignore[no-untyped-call]


def waited(progress: Progress) -> list[Tensor]:
    """The mean of the terms since the last time, which are forgotten; nothing where there are none."""
    terms, progress.waiting = list(progress.waiting), Waiting()
    return [torch.stack(terms).mean()] if terms else []


def _named(names: tuple[str, ...], outputs: tuple[Any, ...]) -> dict[str, Tensor]:
    return {name: t for name, t in zip(names, outputs, strict=True) if isinstance(t, Tensor)}


def _counted(labels: Any, shift: int) -> Tensor | None:
    """Which positions predict a label; None where labels are not those of positions."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    counted = labels != IGNORED
    return functional.pad(counted[:, shift:], (0, shift)) if shift else counted


def _reads(program: Program, name: str) -> bool:
    return any(str(node.target) == name and node.users for node in program.placeholders())


def share(present: Mapping[str, Any], shift: int) -> Tensor | float:
    """Which part of the step's labels this call has: where several calls make a step, their losses are added up."""
    items, labels = present.get(COUNT), present.get("shift_labels", present.get(LABELS))
    if not isinstance(items, Tensor) or not isinstance(labels, Tensor):
        return 1.0
    if shift and "shift_labels" not in present:
        labels = labels[..., shift:]
    return (labels != IGNORED).sum() / items.to(labels.device).sum()


_ALIKE = frozenset(
    {
        aten.constant_pad_nd.default,
        aten.pad.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten._to_copy.default,
    }
)
"""Operators after which labels stand where they stood, or have others behind them."""


def label_shift(program: Program) -> int:
    """How many positions after the one that predicts it a label stands, as the graph's loss reads them: 1 in causal
    language models, otherwise 0."""
    starts = {0}
    pending = [node for node in program.placeholders() if str(node.target) == LABELS]
    while pending:
        for user in pending.pop().users:
            if user.target is aten.slice.Tensor and _last_axis(user):
                start = user.args[2] if len(user.args) > 2 else 0
                starts.add(start if isinstance(start, int) and start > 0 else 0)
                pending += [user] if not start else []
            elif user.target in _ALIKE or user.target is aten.slice.Tensor:
                pending.append(user)
    return max(starts)


def _last_axis(node: fx.Node) -> bool:
    axis = node.args[1] if len(node.args) > 1 else 0
    source = node.args[0]
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    return axis in (-1, source.meta["val"].dim() - 1)
