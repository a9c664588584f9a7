"""PET's training loops: for members on cloze questions, and for the classifier on the ensemble's answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graftc.applications.pet.distillation import distillation_loss
from graftc.runtime.compiled import Compiled
from graftc.runtime.optim.groups import param_groups
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.pet.training import StepOptions

Batch = Mapping[str, Tensor]
"""The inputs of a model; the first axis of each is the batch."""

OnStep = Callable[[int, int], None]
"""A callback that receives the number of the finished step, from 1, and the total number of steps."""

IGNORED = -100
"""The label of a token that the loss ignores."""


@dataclass(frozen=True)
class Questions:
    """A batch of labelled rows as cloze questions.

    Attributes:
        inputs: the model's inputs.
        labels: int64 ``[members * batch]``: each member's rows in turn, with the same number for every member.
    """

    inputs: Batch
    labels: Tensor


def draws(rows: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Yield batches of row indices without end: shuffled epochs in sequence, with every batch full.

    Raises:
        ValueError: if there are no rows.
    """
    if rows < 1:
        raise ValueError("no rows to draw from")
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(rows, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def train_members(
    compiled: Compiled,
    questions: Iterator[Questions],
    texts: Iterator[Sequence[Batch]],
    pace: StepOptions,
    *,
    auxiliary: float,
    own: Sequence[Sequence[nn.Parameter]] | None = None,
    on_step: OnStep = lambda *_: None,
) -> list[float]:
    """Train members on ``(1 - auxiliary) CE + auxiliary MLM`` (Schick & Schütze 2021), each as if it trained alone.

    The members' losses are summed, and gradients are clipped separately for each member.

    Args:
        compiled: the model, in train mode; it answers cloze questions and takes ``token_targets``.
        questions: for each step, the labelled rows of all members.
        texts: for each step, a batch with ``token_targets`` for each member; not read if ``auxiliary`` is 0.
        pace: the number of steps and the optimiser settings.
        auxiliary: the weight of the language model's own loss.
        own: the trainable parameters of each member; by default there is one member, to which all of them belong.
        on_step: the callback after each step; see `OnStep`.

    Returns:
        The loss of each step, summed over the members.

    Raises:
        GraftError: GC181 if a loss is not finite.
    """
    members = 1 if own is None else len(own)

    def losses() -> Iterator[Tensor]:
        asked = next(questions)
        logits = compiled(**asked.inputs).logits.float()
        yield (1 - auxiliary) * members * cross_entropy(logits, asked.labels)
        if auxiliary:
            for text in next(texts):
                if bool((text["token_targets"] != IGNORED).any()):  # otherwise the mean would be over no tokens
                    yield auxiliary * compiled(**text).loss.float()

    return _train(compiled, losses, pace, own, on_step)


def train_classifier(
    compiled: Compiled,
    batches: Iterator[tuple[Batch, Tensor]],
    pace: StepOptions,
    *,
    temperature: float,
    on_step: OnStep = lambda *_: None,
) -> list[float]:
    """Train a classifier on soft labels, by distillation.

    Args:
        compiled: the model, in train mode, whose output has ``logits``, ``[batch, labels]``.
        batches: for each step, the inputs and the ensemble's logits, ``[batch, labels]``.
        pace: the number of steps and the optimiser settings.
        temperature: the temperature of `distillation_loss`.
        on_step: the callback after each step; see `OnStep`.

    Returns:
        The loss of each step.

    Raises:
        GraftError: GC181 if a loss is not finite.
    """

    def losses() -> Iterator[Tensor]:
        inputs, soft = next(batches)
        yield distillation_loss(compiled(**inputs).logits.float(), soft, temperature)

    return _train(compiled, losses, pace, None, on_step)


def _train(
    compiled: Compiled,
    losses: Callable[[], Iterator[Tensor]],
    pace: StepOptions,
    own: Sequence[Sequence[nn.Parameter]] | None,
    on_step: OnStep,
) -> list[float]:
    groups = param_groups(compiled, pace.learning_rate, weight_decay=pace.weight_decay)
    optimiser = torch.optim.AdamW(groups, lr=pace.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, _pacing(pace.steps, pace.warmup))
    clipped = own if own is not None else [[p for group in groups for p in group["params"]]]
    compiled.begin(pace.steps)
    seen: list[Tensor] = []
    for step in range(1, pace.steps + 1):
        total = torch.zeros((), device=compiled.device)
        # One loss at a time, so that only one pass's activations are in memory.
        for loss in losses():
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        extra = compiled.extra_loss()
        if extra.requires_grad:
            extra.backward()  # type: ignore[no-untyped-call]
        for parameters in clipped if pace.max_grad_norm else ():
            nn.utils.clip_grad_norm_(parameters, pace.max_grad_norm)
        optimiser.step()
        schedule.step()
        compiled.after_step()
        optimiser.zero_grad(set_to_none=True)
        seen.append(total)
        on_step(step, pace.steps)
    values: list[float] = torch.stack(seen).tolist() if seen else []
    wrong = next((step for step, loss in enumerate(values, 1) if loss - loss != 0), None)
    if wrong is not None:
        raise GraftError("GC181", f"the loss of step {wrong} of {pace.steps} is {values[wrong - 1]}")
    return values


def _pacing(steps: int, warmup: float) -> Callable[[int], float]:
    rise = round(steps * warmup)

    def pace(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return max(0.0, (steps - step) / max(1, steps - rise))

    return pace


def logits_of(compiled: Compiled, batches: Iterator[tuple[list[int], Batch]], rows: int) -> Tensor:
    """Return the logits for all rows, float32 ``[rows, labels]`` on the CPU, computed in eval mode.

    Args:
        compiled: the model, whose output has ``logits``; it is left in eval mode.
        batches: for each batch, its row indices and the model's inputs.
        rows: the number of rows.

    Raises:
        ValueError: if there are no batches.
    """
    compiled.eval()
    logits: Tensor | None = None
    with torch.no_grad():
        for some, inputs in batches:
            batch_logits = compiled(**inputs).logits.float().cpu()
            if logits is None:
                logits = batch_logits.new_empty(rows, batch_logits.shape[1])
            logits[torch.tensor(some)] = batch_logits
    if logits is None:
        raise ValueError("no rows")
    return logits
