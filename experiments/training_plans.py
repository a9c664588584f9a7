"""The cells that train: sweeps of learning rates on one seed, and further seeds at the best rate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from experiments.cells import Cell, Known, Part
from experiments.tasks import HEAD, REVIEWS, TABLES, texts_of

LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The learning rates that a sweep may visit."""
MOST_RATES = 5
"""A sweep starts with three neighbouring rates. While the best one is at an end, the next rate there is added."""
SEEDS = range(5)
STEPS, BATCH, HEAD_RATE = 100, (16, 32), 1e-2
PER_CLASS, MANY = 16, 1000
LAYERS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")
_LINEAR: Mapping[str, Any] = {"target": {"role": [*LAYERS]}}
_RANK: Mapping[str, Any] = {**_LINEAR, "rank": 8}
_SCALED: Mapping[str, Any] = {**_RANK, "alpha": 16}
_BUDGET: Mapping[str, Any] = {"rank": 12, "target_rank": 8, "warmup_steps": 10, "final_steps": 30}

WEIGHTS, FACTORS, VECTORS = 1e-4, 1e-3, 3e-3
"""The middle rates of sweeps: for whole weights, for matrices that are added, and for vectors."""


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a table.

    Attributes:
        name: as it is shown.
        fields: the entry of a spec's ``adapt``; None for a linear model on frozen embeddings.
        middle: the middle one of the first three rates.
        optimiser: a key of `experiments.loop.OPTIMISERS`.
        head: modules that train as well.
        swept: whether rates are swept; if not, all cells have the middle one.
    """

    name: str
    fields: Mapping[str, Any] | None
    middle: float = FACTORS
    optimiser: str = "adamw"
    head: tuple[str, ...] = (HEAD,)
    swept: bool = True

    @property
    def method(self) -> str:
        """The tag of the method; empty without one."""
        return str((self.fields or {}).get("method", ""))

    @property
    def spec(self) -> dict[str, Any] | None:
        """The spec, in which the head trains as well; None without a method."""
        if self.fields is None:
            return None
        return {"adapt": [dict(self.fields)], **({"train": [*self.head]} if self.head else {})}


FLOOR, ALONE = "linear model on embeddings", "head alone"
ALONE_FIXED = f"{ALONE}, rate {HEAD_RATE:g}"
FLOORS = (FLOOR, ALONE, ALONE_FIXED)
"""The names of the rows that adapt nothing."""
_ALONE: Mapping[str, Any] = {"method": "full", "target": {"modules": [HEAD]}}
_LISTED: Sequence[Row] = (
    Row(FLOOR, None),
    Row(ALONE, _ALONE, HEAD_RATE, head=()),
    Row(ALONE_FIXED, _ALONE, HEAD_RATE, head=(), swept=False),
    Row("full", {"method": "full", **_LINEAR}, WEIGHTS),
    Row("LoRA", {"method": "lora", **_SCALED}),
    Row("DoRA", {"method": "dora", **_SCALED}),
    Row("OFT", {"method": "oft", **_LINEAR, "block_size": 16}),
    Row("(IA)3", {"method": "ia3"}, VECTORS),
    Row("Houlsby", {"method": "houlsby"}),
    Row("parallel adapter", {"method": "he_parallel"}),
    Row("prefix", {"method": "prefix", "length": 16}, VECTORS),
    Row("prompt", {"method": "prompt", "length": 16}, VECTORS),
    Row("SpIEL", {"method": "spiel", **_LINEAR, "equivalent_rank": 8}, FACTORS, "aged"),
    Row("BitFit", {"method": "bitfit"}, VECTORS),
)
"""The rows that are trained with five seeds."""
_OTHERS: Sequence[Row] = (
    Row("rsLoRA", {"method": "lora", **_SCALED, "rslora": True}),
    Row("PiSSA", {"method": "lora", **_SCALED, "init": "pissa"}),
    Row("AdaLoRA", {"method": "adalora", **_LINEAR, **_BUDGET}),
    Row("DyLoRA", {"method": "dylora", **_SCALED}),
    Row("SoRA", {"method": "sora", **_SCALED}),
    Row("VeRA", {"method": "vera", **_LINEAR, "rank": 64}, VECTORS),
    Row("LoHa", {"method": "loha", **_SCALED}),
    Row("LoKr", {"method": "lokr", **_SCALED}),
    Row("BOFT", {"method": "boft", **_LINEAR, "block_size": 8}),
    Row("HiRA", {"method": "hira", **_RANK}),
    Row("MiSS", {"method": "miss", **_RANK}),
    Row("SHiRA", {"method": "shira", **_RANK}),
    Row("Lily", {"method": "lily", **_RANK}),
    Row("C3A", {"method": "c3a", **_LINEAR, "block_size": 64}),
    Row("GraLoRA", {"method": "gralora", **_SCALED, "k": 2}),
    Row("LoReFT", {"method": "loreft"}),
    Row("LN tuning", {"method": "norms"}, VECTORS),
    Row("Pfeiffer", {"method": "pfeiffer"}),
    Row("sequential adapter", {"method": "he_sequential"}),
    Row("AdapterL", {"method": "adapter_l"}),
    Row("Bapna-Firat", {"method": "bapna_firat"}),
    Row("LLM-Adapters", {"method": "llm_adapters"}),
    Row("AdaMix", {"method": "adamix"}),
    Row("AdaMix, LoRA", {"method": "adamix_lora", **_SCALED}),
    Row("MAM", {"method": "mam"}),
    Row("UniPELT", {"method": "unipelt"}),
    Row("P-tuning v2", {"method": "p_tuning_v2"}, VECTORS),
    Row("pre-embed", {"method": "pre_embed", "length": 16}, VECTORS),
    Row("pre-layer", {"method": "pre_layer", "length": 16}, VECTORS),
    Row("PASTA", {"method": "pasta", "special_tokens": [101, 102]}, VECTORS),
    Row("rows", {"method": "rows", **_LINEAR, "density": 0.1}, WEIGHTS),
    Row("mask", {"method": "mask"}, FACTORS),
    Row("LT-SFT", {"method": "lt_sft"}, WEIGHTS),
    Row("diff pruning", {"method": "diff_pruning"}, WEIGHTS),
    Row("Child-Tuning", {"method": "child_tuning", **_LINEAR}, WEIGHTS),
    Row("last layers", {"method": "last_layers", "count": 2}, WEIGHTS),
    Row("pruning", {"method": "pruning"}, WEIGHTS),
)
"""The rows that are trained with one seed."""
ROWS = {row.name: row for row in (*_LISTED, *_OTHERS)}
REPEATED = {row: row in _LISTED for row in ROWS.values()}
"""All rows, and whether they are trained with several seeds."""
_COMPARED = (*FLOORS, "full", "LoRA", "DoRA", "Houlsby", "prefix", "SpIEL", "BitFit")
COMPARED = {ROWS[name]: True for name in _COMPARED}
"""The rows that are trained on every task."""


@dataclass(frozen=True)
class Setting:
    """The settings that all cells of a table share.

    Attributes:
        part: the name of the part.
        task: a task of `experiments.tasks`.
        texts: the number of training texts.
        quick: whether cells are tiny.
        batch: the texts of a batch, and the tokens of a text at most.
        steps: the number of steps.
        seeds: the seeds of rows that are repeated.
    """

    part: str
    task: str
    texts: int
    quick: bool = False
    batch: tuple[int, int] = BATCH
    steps: int = STEPS
    seeds: Sequence[int] = SEEDS

    def cell(self, row: Row, rate: float, seed: int) -> Cell:
        """Return a cell of a row."""
        settings = {
            "spec": row.spec,
            "task": self.task,
            "texts": self.texts,
            "batch": [*self.batch],
            "head_rate": HEAD_RATE,
            "optimiser": row.optimiser,
        }
        model, steps = ("tiny-bert", 3) if self.quick else ("minilm", self.steps)
        return Cell(self.part, row.name, row.method, model, "float32", rate, seed, steps, settings)


def quality(figures: Mapping[str, Any]) -> tuple[float, float]:
    """Return what a rate is chosen by: the quality on the validation texts, then the loss on them."""
    return figures["validation"], -figures.get("validation_loss", 0.0)


def swept(cell_at: Callable[[float], Cell], middle: float, known: Known) -> tuple[list[Cell], float | None]:
    """Return the cells of a sweep as far as they follow from known figures, and the best rate, once it is known."""
    place = LADDER.index(middle)
    first, last = max(0, place - 1), min(len(LADDER), place + 2)
    while True:
        cells = [cell_at(rate) for rate in LADDER[first:last]]
        outcomes = [known(cell) for cell in cells]
        values = [quality(figures) for figures in outcomes if figures is not None]
        if len(values) < len(cells):
            return cells, None
        best = max(range(len(cells)), key=values.__getitem__)
        if len(cells) < MOST_RATES and best == 0 and first > 0:
            first -= 1
        elif len(cells) < MOST_RATES and best == len(cells) - 1 and last < len(LADDER):
            last += 1
        else:
            return cells, cells[best].rate


class Repeated(Protocol):
    """The settings that all cells of a table share; sweeps use the first of the seeds."""

    @property
    def part(self) -> str:
        """The name of the part."""

    @property
    def seeds(self) -> Sequence[int]:
        """The seeds of rows that are repeated."""

    def cell(self, row: Row, rate: float, seed: int) -> Cell:
        """Return a cell of a row."""


Rows = Mapping[Row, bool]
"""The rows of a table, and for each whether it is trained with all seeds."""


def swept_row(setting: Repeated, row: Row, known: Known) -> tuple[list[Cell], float | None]:
    """Return a row's sweep as `swept` does. A row that sweeps no rates has an empty one; without a method, rate 0."""
    if row.fields is None:
        return [], 0.0
    if not row.swept:
        return [], row.middle
    return swept(lambda rate: setting.cell(row, rate, setting.seeds[0]), row.middle, known)


def best_cells(setting: Repeated, row: Row, rate: float, repeated: bool) -> list[Cell]:
    """Return the cells of a row at its best rate, by seed."""
    return [setting.cell(row, rate, seed) for seed in (setting.seeds if repeated else setting.seeds[:1])]


def row_cells(setting: Repeated, row: Row, known: Known, repeated: bool) -> Iterator[Cell]:
    """Yield the cells of a row."""
    cells, best = swept_row(setting, row, known)
    yield from cells
    if best is not None:
        yield from (cell for cell in best_cells(setting, row, best, repeated) if cell not in cells)


def plan_of(tables: Callable[[], Iterable[tuple[Repeated, Rows]]]) -> Callable[[Known], tuple[Cell, ...]]:
    """Return the plan of a part that consists of tables, each a setting with its rows."""

    def plan(known: Known) -> tuple[Cell, ...]:
        return tuple(
            cell
            for setting, rows in tables()
            for row, repeated in rows.items()
            for cell in row_cells(setting, row, known, repeated)
        )

    return plan


def encoder_settings(quick: bool = False) -> tuple[Setting, ...]:
    """Return the setting of the part on one task with many classes."""
    return (setting_of("encoder", "r52", texts_of("r52", PER_CLASS), quick),)


def task_settings(quick: bool = False) -> tuple[Setting, ...]:
    """Return the settings of the part on several tasks, with more texts."""
    tasks = [name for name in TABLES if name != "r52"] + ([] if quick else [REVIEWS])
    return tuple(setting_of("tasks", task, MANY, quick) for task in tasks)


def setting_of(part: str, task: str, texts: int, quick: bool = False, **fields: Any) -> Setting:
    """Return a setting, or a tiny one instead."""
    if quick:
        return Setting(part, task, 64, quick=True, seeds=SEEDS[:2])
    return Setting(part, task, texts, **fields)


def encoder(quick: bool = False) -> Part:
    """Return the part that trains every method on one task."""
    return _part("encoder", encoder_settings, _first(COMPARED, 5) if quick else REPEATED, quick)


def tasks(quick: bool = False) -> Part:
    """Return the part that trains some methods on several tasks."""
    return _part("tasks", task_settings, _first(COMPARED, 4) if quick else COMPARED, quick)


def _first(rows: Rows, count: int) -> Rows:
    return dict([*rows.items()][:count])


def _part(name: str, settings: Callable[[bool], tuple[Setting, ...]], rows: Rows, quick: bool) -> Part:
    return classifiers(name, lambda: ((setting, rows) for setting in settings(quick)))


def classifiers(name: str, tables: Callable[[], Iterable[tuple[Repeated, Rows]]]) -> Part:
    """Return a part whose cells train the encoder."""
    return Part(name, "experiments.classifying:figures", "experiments.tasks:files_of", plan_of(tables))
