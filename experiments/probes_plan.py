"""The cells of the probes: claims that need a figure of their own, each in a part of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.cells import Cell, Part
from experiments.combined import combined, tasks_in
from experiments.tasks import files_of, texts_of
from experiments.training_plans import MANY, PER_CLASS, ROWS, Row, Rows, Setting, plan_of, setting_of

COMPOSED = ("r8", "20newsgroups")
"""The tasks whose changes are added."""
DIRECTIONS = (ROWS["full"], ROWS["LoRA"], ROWS["DoRA"])
COMPOSITION = (ROWS["full"], ROWS["LT-SFT"])
PLAIN = Row("as it is", None, head=())
ATTENTION = (PLAIN, ROWS["full"], ROWS["PASTA"])
_TINY = replace(ROWS["PASTA"], fields={"method": "pasta", "special_tokens": [1, 2]})


def directions_setting(quick: bool = False) -> Setting:
    """Return the setting of the probe of magnitudes and directions: that of the encoder's table."""
    return setting_of("directions", "r52", texts_of("r52", PER_CLASS), quick)


def attention_setting(quick: bool = False) -> Setting:
    """Return the setting of the probe of attention: that of the encoder's table, with three seeds."""
    return setting_of("attention", "r52", texts_of("r52", PER_CLASS), quick, seeds=range(3))


def composition_setting(quick: bool = False) -> Setting:
    """Return the setting of the probe of composition: the texts of the tasks' tables."""
    return setting_of("composition", combined(COMPOSED), MANY, quick)


def probes(quick: bool = False) -> tuple[Part, ...]:
    """Return the parts of the probes."""
    return (
        _probe(directions_setting(quick), DIRECTIONS),
        _probe(composition_setting(quick), COMPOSITION),
        _probe(attention_setting(quick), (*ATTENTION[:2], _TINY) if quick else ATTENTION),
    )


MODULES = {"directions": "directions", "composition": "composing", "attention": "attention"}


def _probe(setting: Setting, rows: Sequence[Row]) -> Part:
    compute = f"experiments.{MODULES[setting.part]}:figures"
    plan = plan_of(lambda: [(setting, with_seeds(rows))])
    return Part(setting.part, compute, "experiments.probes_plan:probe_files", plan)


def with_seeds(rows: Sequence[Row]) -> Rows:
    """Return rows that are trained with all seeds, except the model as it is, which does not depend on one."""
    return {row: row.fields is not None for row in rows}


def probe_files(cell: Cell) -> tuple[Path, ...]:
    """Return the files that a cell's model and texts are made of."""
    names = tasks_in(cell.settings["task"])
    every = [path for name in names for path in files_of(replace(cell, settings={**cell.settings, "task": name}))]
    return tuple(dict.fromkeys(every))
