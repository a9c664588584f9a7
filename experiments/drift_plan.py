"""The cells of the drift: ten methods with the oldest and the newest transformers and PEFT that graftc supports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from experiments.cells import Cell, Part
from experiments.environments import installed
from experiments.parity_plan import entry, parity
from experiments.probes_plan import probe_files
from experiments.training_plans import MANY, ROWS, Row, setting_of

OLDEST: Mapping[str, str] = {"transformers": "5.13.0", "peft": "0.18.0"}
"""The lower bounds in pyproject.toml."""
METHODS = ("LoRA", "rsLoRA", "DoRA", "AdaLoRA", "IA3", "VeRA", "LoHa", "LoKr", "OFT", "LN tuning")
"""Rows of the parity table that the oldest PEFT has as well."""
TASK = "r8"
_ROWS = {"IA3": "(IA)3"}
"""Names that differ in the table of the encoder."""


def environments(quick: bool = False) -> dict[str, dict[str, str]]:
    """Return the versions of each environment; the newest ones are those that are installed."""
    newest = installed(OLDEST)
    return {"oldest": newest if quick else dict(OLDEST), "newest": newest}


def drift(quick: bool = False) -> Part:
    """Return the part that computes the same cells in two environments."""
    cells = tuple(_cells(quick))
    return Part("drift", "experiments.drift:figures", "experiments.drift_plan:drift_files", lambda _: cells)


def _cells(quick: bool) -> Iterator[Cell]:
    for age, versions in environments(quick).items():
        for own in (*compared(quick), *trained(quick)):
            yield cell_in(own, age, versions)


def cell_in(own: Cell, age: str, versions: Mapping[str, str]) -> Cell:
    """Return the cell that computes another one in an environment."""
    settings = {"part": own.part, "cell": own.to_json(), "environment": dict(versions)}
    return replace(own, part="drift", name=f"{own.part}/{age}/{own.name}", settings=settings)


def compared(quick: bool = False) -> tuple[Cell, ...]:
    """Return the cells that compare with PEFT: those of the parity table on MiniLM in float32."""
    first, *_ = cells = parity(quick).plan(lambda _: None)
    some = {cell.name: cell for cell in cells if (cell.model, cell.dtype) == (first.model, "float32")}
    return tuple(some[name] for name in (METHODS[:2] if quick else METHODS))


def trained(quick: bool = False) -> tuple[Cell, ...]:
    """Return the cells that train the same methods for the task, at the first middle rate of their sweeps."""
    setting = setting_of("encoder", TASK, MANY, quick)
    some = compared(quick)
    model = "tiny-bert" if quick else "minilm"
    rows = (Row(own.name, entry(own.name, model), ROWS[_ROWS.get(own.name, own.name)].middle) for own in some)
    return tuple(setting.cell(row, row.middle, own.seed) for row, own in zip(rows, some, strict=True))


def drift_files(cell: Cell) -> tuple[Path, ...]:
    """Return the files that a cell's model and texts are made of."""
    return probe_files(replace(cell, settings={"task": TASK}))
