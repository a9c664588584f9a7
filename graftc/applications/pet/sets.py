"""The examples from which each generation's members learn, stored as one line for each member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graftc.applications.pet.generations import new_examples, new_examples_in, shares_of_labels
from graftc.applications.pet.task import Examples, Task
from graftc.specs.pet.training import IpetOptions

Line = Mapping[str, Any]
"""A member's set: the members that gave the labels, the unlabelled rows to learn from, the labels of these rows, and
how many rows each label lacks."""


def new_sets(task: Task, generation: int, logits: Tensor, weights: Tensor, options: IpetOptions) -> list[Line]:
    """Return iPET's examples for the members of a generation.

    Args:
        task: the run.
        generation: the number of the generation, counted from 1.
        logits: the previous generation's logits on the unlabelled rows, ``[members, rows, labels]``.
        weights: the weights of the members.
        options: the document's iPET options.
    """
    counts = [list(task.labelled.labels).count(label) for label in range(logits.shape[2])]
    total = new_examples_in(generation - 1, len(task.labelled), options.growth, options.start_size)
    wanted = shares_of_labels(total, counts)

    def make() -> list[Line]:
        return [_line(task, generation, member.number, logits, weights, wanted, options) for member in task.members]

    return list(task.stages.lines(f"generation-{generation}/sets", make))


def _line(
    task: Task,
    generation: int,
    member: int,
    logits: Tensor,
    weights: Tensor,
    wanted: Sequence[int],
    options: IpetOptions,
) -> Line:
    new = new_examples(
        member,
        logits,
        weights,
        wanted,
        share=options.share,
        most_likely=generation == 1 and not len(task.labelled),
        generator=task.generator("set", generation, member),
    )
    return {
        "member": member,
        "teachers": list(new.teachers),
        "missing": list(new.missing),
        "rows": list(new.rows),
        "labels": list(new.labels),
    }


def set_of(task: Task, line: Line | None) -> Examples:
    """Return the labelled rows and, if a line is given, the rows that it lists."""
    labelled = Examples(task.labelled.texts, task.labelled.labels)
    if line is None:
        return labelled
    return labelled + Examples([task.unlabelled.texts[row] for row in line["rows"]], line["labels"])
