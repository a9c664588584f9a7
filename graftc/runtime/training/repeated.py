"""Run several forward passes within one call, for objectives that compare their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graftc.compat.operators import TO_COPY
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
"""The label that transformers' losses ignore."""


@dataclass(frozen=True)
class Outputs:
    """A description of the flat outputs of a train Program, for objectives.

    Attributes:
        names: the names of all outputs.
        loss: the index of the loss; None if there is no loss.
        shift: the number of positions between a label and the earlier position that predicts it.
        counted: whether the loss is the mean over all labels of the step, whose count is passed to the call.
    """

    names: tuple[str, ...]
    loss: int | None
    shift: int
    counted: bool = False


def outputs_of(executable: Installed) -> Outputs:
    """Return the description of a train Program's flat outputs that objectives use."""
    return executable.once("outputs", _outputs)


def _outputs(program: Program) -> Outputs:
    names = program.outputs.names
    loss = names.index("loss") if "loss" in names else None
    counted = any(str(node.target) == COUNT and node.users for node in program.placeholders())
    return Outputs(names, loss, label_shift(program), counted)


def repeated(
    runner: AdaptedRunner, key: ProgramKey, present: Mapping[str, Any], missed: Callable[[], None]
) -> tuple[Any, ...]:
    """Run a Program several times in one call if objectives compare the passes.

    Args:
        runner: the Runner of the model.
        key: the key of the Program.
        present: the inputs of the call.
        missed: the function to call when the gradient of a term is not computed.

    Returns:
        The flat outputs of the first pass; if they contain a loss, the objectives' terms have been added to it.
    """
    first, objectives = runner.run(key, present), runner.steering.outputs
    if not runner.training or not objectives or runner.base_only:
        return first
    if key.entry in ("losses", "scores"):  # there are no outputs to compare
        missed()
        return first
    count = max(objective.passes for objective in objectives.values())
    shape = outputs_of(runner.shown.executables[key])
    passes = [_named(shape.names, first)]
    passes += [_named(shape.names, runner.run(key, present)) for _ in range(count - 1)]
    counted = _counted(present.get(LABELS), shape.shift)
    terms = [objective.value(passes[: objective.passes], counted) for objective in objectives.values()]
    term = terms[0] if len(terms) == 1 else torch.stack(terms).sum()
    term = term * share(present, shape.shift) if shape.counted else term
    loss = first[shape.loss] if shape.loss is not None else None
    if isinstance(loss, Tensor) and loss.dim() == 0:
        assert shape.loss is not None
        return (*first[: shape.loss], loss + term.to(loss.dtype), *first[shape.loss + 1 :])
    if term.requires_grad:
        _wait(term, first, runner.progress, missed)
    return first


def _wait(term: Tensor, outputs: tuple[Any, ...], progress: Progress, missed: Callable[[], None]) -> None:
    """Store a term for the next `extra_loss`; the backward pass through the term's own forward passes discards it."""
    progress.waiting.append(term)
    if is_traced():
        return

    def gone(gradient: Tensor) -> None:
        if any(waiting is term for waiting in progress.waiting):
            progress.waiting[:] = [waiting for waiting in progress.waiting if waiting is not term]
            missed()

    output = next((t for t in outputs if isinstance(t, Tensor) and t.requires_grad), None)
    if output is not None:
        output.register_hook(gone)  # type: ignore[no-untyped-call]


def waited(progress: Progress) -> list[Tensor]:
    """Discard the terms stored since the last call and return their mean in a list, empty if there were no terms."""
    terms, progress.waiting = list(progress.waiting), Waiting()
    return [torch.stack(terms).mean()] if terms else []


def _named(names: tuple[str, ...], outputs: tuple[Any, ...]) -> dict[str, Tensor]:
    return {name: t for name, t in zip(names, outputs, strict=True) if isinstance(t, Tensor)}


def _counted(labels: Any, shift: int) -> Tensor | None:
    """Return a mask of the positions that predict a label; None if the labels are not per position."""
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return None
    counted = labels != IGNORED
    return functional.pad(counted[:, shift:], (0, shift)) if shift else counted


def share(present: Mapping[str, Any], shift: int) -> Tensor | float:
    """Return this call's share of the step's labels; if a step consists of several calls, their losses are added up."""
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
        TO_COPY,
    }
)
"""Operators that leave labels in their positions or append others after them."""


def label_shift(program: Program) -> int:
    """Return the number of positions between a label and the position that predicts it, according to the graph's loss.

    It is 1 for causal language models, otherwise 0.
    """
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
