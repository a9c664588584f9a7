"""Training loops of PET: members on cloze questions, and the classifier on what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graftc.runtime.compiled import Compiled
from graftc.runtime.optim.groups import param_groups
from graftc.runtime.pet.distillation import distillation_loss
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.pet.training import StepOptions

Batch = Mapping[str, Tensor]
"""What a model is called with; the first axis of each is the batch."""

OnStep = Callable[[int, int], None]
"""Is told the step that is done, from 1, and how many there are."""

IGNORED = -100
"""The label of a token that does not count."""


@dataclass(frozen=True)
class Questions:
    """A batch of labelled rows as cloze questions.

    Attributes:
        inputs: what the model is called with.
        labels: int64 ``[members * batch]``: the rows of one member after the other, as many of each.
    """

    inputs: Batch
    labels: Tensor


def draws(rows: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Numbers of rows for batches without end: one shuffled epoch after the other, and every batch full.

    Raises:
        ValueError: there are no rows.
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
    """Train members on ``(1 - auxiliary) CE + auxiliary MLM`` (Schick & Schütze 2021), each as if it were alone.

    The losses of members add up, and gradients are clipped for each of them.

    Args:
        compiled: answers cloze questions, and takes ``token_targets``; it is in train mode.
        questions: labelled rows of all members, for each step.
        texts: for each step a batch with ``token_targets`` for each member; not asked for where ``auxiliary`` is 0.
        pace: steps, and what the optimiser is told.
        auxiliary: the share of the language model's own loss.
        own: what trains of each member; by default there is one member, and it has all.
        on_step: see there.

    Returns:
        The loss of each step, summed over the members.

    Raises:
        GraftError: GC181 where a loss is not finite.
    """
    members = 1 if own is None else len(own)

    def losses() -> Iterator[Tensor]:
        asked = next(questions)
        logits = compiled(**asked.inputs).logits.float()
        yield (1 - auxiliary) * members * cross_entropy(logits, asked.labels)
        if auxiliary:
            for text in next(texts):
                if bool((text["token_targets"] != IGNORED).any()):  # else the mean over none of them
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
    """Distil: train a classifier on soft labels.

    Args:
        compiled: gives ``logits``, ``[batch, labels]``; it is in train mode.
        batches: for each step inputs and the ensemble's logits, ``[batch, labels]``.
        pace: steps, and what the optimiser is told.
        temperature: see `distillation_loss`.
        on_step: see there.

    Returns:
        The loss of each step.

    Raises:
        GraftError: GC181 where a loss is not finite.
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
        # One after the other, so that activations of one pass at a time are kept.
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
    found: list[float] = torch.stack(seen).tolist() if seen else []
    wrong = next((step for step, loss in enumerate(found, 1) if loss - loss != 0), None)
    if wrong is not None:
        raise GraftError("GC181", f"the loss of step {wrong} of {pace.steps} is {found[wrong - 1]}")
    return found


def _pacing(steps: int, warmup: float) -> Callable[[int], float]:
    rise = round(steps * warmup)

    def pace(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return max(0.0, (steps - step) / max(1, steps - rise))

    return pace


def logits_of(compiled: Compiled, batches: Iterator[tuple[list[int], Batch]], rows: int) -> Tensor:
    """Logits of all rows, float32 ``[rows, labels]`` on the CPU, in eval mode.

    Args:
        compiled: gives ``logits``; it is in eval mode afterwards.
        batches: which rows, and what the model is called with.
        rows: how many there are.

    Raises:
        ValueError: there are none.
    """
    compiled.eval()
    found: Tensor | None = None
    with torch.no_grad():
        for some, inputs in batches:
            made = compiled(**inputs).logits.float().cpu()
            if found is None:
                found = made.new_empty(rows, made.shape[1])
            found[torch.tensor(some)] = made
    if found is None:
        raise ValueError("no rows")
    return found
