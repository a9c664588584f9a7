"""iPET's training sets: each generation of members learns from what the others of the one before are sure of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.runtime.pet.ensemble import mixed_logits

START_SIZE = 10
"""Examples of the first generation where none are labelled."""


@dataclass(frozen=True)
class NewExamples:
    """Unlabelled rows and the labels that other members gave them.

    Attributes:
        rows: each at most once, by label and by row.
        labels: of these.
        teachers: numbers of the members that gave them.
        missing: by how many each label has fewer rows than it should have.
    """

    rows: tuple[int, ...]
    labels: tuple[int, ...]
    teachers: tuple[int, ...]
    missing: tuple[int, ...]


def new_examples_in(generation: int, labelled: int, growth: float, start_size: int = START_SIZE) -> int:
    """How many examples a generation adds to the labelled ones: ``floor(|T| d^(g+1)) - |T|``.

    Args:
        generation: ``g``, from 0.
        labelled: ``|T|``. Where it is 0, ``start_size / d`` grows in its place, so that the first has ``start_size``.
        growth: ``d``.
        start_size: see there.
    """
    if labelled:
        return max(0, math.floor(_exactly(labelled * growth ** (generation + 1))) - labelled)
    return math.floor(_exactly(start_size * growth**generation))


def shares_of_labels(total: int, counts: Sequence[int]) -> tuple[int, ...]:
    """``total`` examples in the ratio of ``counts``, or balanced where all of these are 0; largest remainders round.

    Args:
        total: how many.
        counts: labelled examples of each label.

    Raises:
        ValueError: there are no labels.
    """
    if not counts:
        raise ValueError("no labels")
    parts = list(counts) if any(counts) else [1] * len(counts)
    every = sum(parts)
    whole = [total * part // every for part in parts]
    rest = [total * part % every for part in parts]
    # Of equal remainders that of the first label goes first; a label without examples has none.
    for label in sorted(range(len(parts)), key=lambda label: -rest[label])[: total - sum(whole)]:
        whole[label] += 1
    return tuple(whole)


def teachers_of(member: int, members: int, share: float, generator: torch.Generator) -> tuple[int, ...]:
    """Members that label for one: ``share`` of the others, at least one, drawn without replacement; in order.

    Raises:
        ValueError: there are no others.
    """
    others = [other for other in range(members) if other != member]
    if not others:
        raise ValueError("a single member has no others that could label for it")
    drawn = torch.randperm(len(others), generator=generator)[: min(len(others), max(1, round(len(others) * share)))]
    return tuple(sorted(others[int(i)] for i in drawn))


def new_examples(
    member: int,
    logits: Tensor,
    weights: Tensor,
    wanted: Sequence[int],
    *,
    share: float = 0.25,
    most_likely: bool = False,
    generator: torch.Generator,
) -> NewExamples:
    """What a member's next training set has beside the labelled examples (Schick & Schütze 2021, iPET).

    A random part of the *other* members label: the weighted mean of their logits, softmax at ``T = 1``. Of the rows
    that a label is the most probable one of, as many as wanted are drawn without replacement, with probability
    proportional to that largest probability. A label with too few rows gets all that it has.

    Args:
        member: whose set it is.
        logits: ``[members, rows, labels]``, of all members on the unlabelled rows.
        weights: ``[members]``, as the ensemble weighs them; teachers that weigh nothing together are equal.
        wanted: how many of each label.
        share: of the others that label.
        most_likely: take for each label the rows that it is most probable of, whatever else is more probable there:
            where nothing is labelled, untrained patterns may never say some label. A row that several labels want goes
            to the one that is more probable.
        generator: a CPU generator; all draws come from it.

    Raises:
        ValueError: there are no other members, or ``wanted`` is not one number for each label.
    """
    members, _, labels = logits.shape
    if len(wanted) != labels:
        raise ValueError(f"{len(wanted)} sizes for {labels} labels")
    teachers = teachers_of(member, members, share, generator)
    some = list(teachers)
    chosen = weights.to(torch.float64)[some]
    mixed = mixed_logits(logits[some].double(), chosen if chosen.sum() > 0 else torch.ones_like(chosen))
    probable = torch.softmax(mixed, dim=1)
    drawn = _most_likely(probable, wanted) if most_likely else _drawn(probable, wanted, generator)
    return NewExamples(
        rows=tuple(row for taken in drawn for row in taken),
        labels=tuple(label for label, taken in enumerate(drawn) for _ in taken),
        teachers=teachers,
        missing=tuple(want - len(taken) for want, taken in zip(wanted, drawn, strict=True)),
    )


def _drawn(probable: Tensor, wanted: Sequence[int], generator: torch.Generator) -> list[list[int]]:
    scores, predicted = probable.max(dim=1)
    drawn = []
    for label, want in enumerate(wanted):
        rows = (predicted == label).nonzero()[:, 0]
        count = min(want, len(rows))
        if count:
            rows = rows[torch.multinomial(scores[rows], count, replacement=False, generator=generator)]
        drawn.append(sorted(rows[:count].tolist()))
    return drawn


def _most_likely(probable: Tensor, wanted: Sequence[int]) -> list[list[int]]:
    labels = probable.shape[1]
    drawn: list[list[int]] = [[] for _ in range(labels)]
    taken: set[int] = set()
    for place in torch.sort(probable.flatten(), descending=True, stable=True).indices.tolist():
        row, label = divmod(place, labels)
        if row not in taken and len(drawn[label]) < wanted[label]:
            taken.add(row)
            drawn[label].append(row)
    return [sorted(rows) for rows in drawn]


def _exactly(number: float) -> float:
    """A product of decimal fractions without its rounding error, which would take one off a whole number."""
    return round(number, 9)
