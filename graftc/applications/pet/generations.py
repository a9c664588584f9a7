"""iPET training sets: a generation's members learn from labels given by other members of the previous generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.applications.pet.ensemble import mixed_logits

START_SIZE = 10
"""The number of examples in the first generation if no examples are labelled."""


@dataclass(frozen=True)
class NewExamples:
    """Unlabelled rows and the labels that other members gave them.

    Attributes:
        rows: the indices of the rows, each at most once, sorted by label and then by row.
        labels: the labels of these rows.
        teachers: the indices of the members that gave the labels.
        missing: for each label, how many of the wanted rows could not be found.
    """

    rows: tuple[int, ...]
    labels: tuple[int, ...]
    teachers: tuple[int, ...]
    missing: tuple[int, ...]


def new_examples_in(generation: int, labelled: int, growth: float, start_size: int = START_SIZE) -> int:
    """Return how many examples a generation adds to the labelled ones: ``floor(|T| d^(g+1)) - |T|``.

    Args:
        generation: ``g``, counted from 0.
        labelled: ``|T|``. If it is 0, the result is ``floor(start_size d^g)`` instead.
        growth: ``d``.
        start_size: the number of examples in the first generation if no examples are labelled.
    """
    if labelled:
        return max(0, math.floor(_exactly(labelled * growth ** (generation + 1))) - labelled)
    return math.floor(_exactly(start_size * growth**generation))


def shares_of_labels(total: int, counts: Sequence[int]) -> tuple[int, ...]:
    """Split ``total`` examples in the ratio of ``counts``, or evenly if these are all 0, rounded by largest remainders.

    Args:
        total: the number of examples.
        counts: the number of labelled examples for each label.

    Raises:
        ValueError: if there are no labels.
    """
    if not counts:
        raise ValueError("no labels")
    parts = list(counts) if any(counts) else [1] * len(counts)
    every = sum(parts)
    shares = [total * part // every for part in parts]
    rest = [total * part % every for part in parts]
    # Equal remainders are ordered by label; a label without examples has no remainder.
    for label in sorted(range(len(parts)), key=lambda label: -rest[label])[: total - sum(shares)]:
        shares[label] += 1
    return tuple(shares)


def teachers_of(member: int, members: int, share: float, generator: torch.Generator) -> tuple[int, ...]:
    """Draw the members that label rows for another: a ``share`` of the others, at least one, in ascending order.

    Raises:
        ValueError: if there are no other members.
    """
    others = [other for other in range(members) if other != member]
    if not others:
        raise ValueError("a single member has no others to label rows for it")
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
    """Draw the examples that a member's next training set adds to the labelled ones (Schick & Schütze 2021, iPET).

    The labels come from a random subset of the *other* members, the teachers: label probabilities are the softmax
    (``T = 1``) of the weighted mean of the teachers' logits. For each label, the wanted number of rows is drawn without
    replacement from the rows for which it is the most probable label, with odds proportional to its probability. A
    label with too few such rows gets all of them.

    Args:
        member: the member that learns from the examples.
        logits: the logits of all members on the unlabelled rows, ``[members, rows, labels]``.
        weights: the ensemble's weights, ``[members]``; if the teachers' weights sum to 0, teachers have equal weights.
        wanted: the number of examples for each label.
        share: the share of the other members that act as teachers.
        most_likely: if true, choose for each label the rows where it has the highest probability, even if another label
            is more probable there. This is for runs without labelled rows, in which untrained patterns may never
            predict some label. A row claimed by several labels goes to the most probable of them.
        generator: the CPU generator for all draws.

    Raises:
        ValueError: if there are no other members, or ``wanted`` does not have one entry for each label.
    """
    members, _, labels = logits.shape
    if len(wanted) != labels:
        raise ValueError(f"wanted has {len(wanted)} entries for {labels} labels")
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
    """Return a product of decimal fractions without its rounding error, which could make ``floor`` one too small."""
    return round(number, 9)
