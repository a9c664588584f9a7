"""Classification and regression tasks for encoders: texts to train on, to choose rates by, and to test with.

The texts that a cell trains on depend on its seed. Those that it is tested with are the same in every cell, and those
that a learning rate is chosen by are never tested with. All are drawn evenly from the classes: half of Reuters' texts
are of one class, and an accuracy on them would say little about the others.
"""

from __future__ import annotations

import io
import random
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from graftc.applications.demo.data import DataSplit, find_data, find_model, read_tab

if TYPE_CHECKING:
    from experiments.cells import Cell

TESTED = 500
"""Texts that every cell is tested with."""
VALIDATION = 250
"""Texts that learning rates are chosen by, from the training split, without those that a cell trains on."""

HEAD = "classifier"
"""The module of the model that trains in every cell, besides what an adaptation adds."""

TABLES: Mapping[str, str] = {"r52": "reuters-r52", "r8": "reuters-r8", "20newsgroups": "20newsgroups"}
REVIEWS = "reviews"
TASKS = (*TABLES, REVIEWS)

_ARCHIVE = Path(__file__).parents[1] / "build" / "experiments" / "vaderSentiment-3.3.2.tar.gz"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_SCALE = 4.0
"""Ratings are from -4 to 4."""


@dataclass(frozen=True)
class Task:
    """The texts of a cell.

    Attributes:
        outputs: the number of outputs of a head: classes, or 1 for a regression.
        train, validation, test: texts with class indices or, for a regression, ratings from -1 to 1.
    """

    outputs: int
    train: DataSplit
    validation: DataSplit
    test: DataSplit

    @property
    def is_regression(self) -> bool:
        """Whether the labels are ratings."""
        return self.outputs == 1


def files_of(cell: Cell) -> tuple[Path, ...]:
    """Return the files that a cell's model and texts are made of."""
    model = tuple(find_model() / name for name in ("config.json", "model.safetensors", "tokenizer.json"))
    if cell.model != "minilm":
        model = ()
    return (*model, *_sources(cell.settings["task"]))


def _sources(task: str) -> tuple[Path, ...]:
    if task == REVIEWS:
        return (archive(),)
    return tuple(find_data() / f"{TABLES[task]}-{split}.tab" for split in ("train", "test"))


def archive() -> Path:
    """Return vaderSentiment's source archive; pip downloads it if it is not there.

    Raises:
        CalledProcessError: if it cannot be downloaded.
    """
    if not _ARCHIVE.exists():
        _ARCHIVE.parent.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", ":all:", "--dest", str(_ARCHIVE.parent), "vaderSentiment==3.3.2"]
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", *options], check=True)
    return _ARCHIVE


def task_of(settings: Mapping[str, Any], seed: int) -> Task:
    """Return the texts of a cell.

    Args:
        settings: the cell's: ``task``, and ``texts``, the number of training texts, drawn evenly from all classes. A
            class with too few texts contributes all of them.
        seed: of the choice of training and validation texts.
    """
    train, test, outputs = _splits(settings["task"])
    chosen = _drawn(train, settings["texts"], outputs, seed)
    taken = set(chosen.texts)
    rest = [i for i, text in enumerate(train.texts) if text not in taken]
    others = DataSplit(tuple(train.texts[i] for i in rest), tuple(train.labels[i] for i in rest))
    return Task(outputs, chosen, _drawn(others, VALIDATION, outputs, seed + 1), _drawn(test, TESTED, outputs, 0))


def _drawn(split: DataSplit, size: int, outputs: int, seed: int) -> DataSplit:
    """Return texts drawn evenly from all classes, as those to train on are."""
    return split.balanced(size, seed) if outputs > 1 else split.subset(size, seed)


def texts_of(task: str, per_class: int) -> int:
    """Return how many training texts a task has with at most this many of each class."""
    train, _, outputs = _splits(task)
    if outputs == 1:
        return per_class
    return sum(min(per_class, train.labels.count(label)) for label in range(outputs))


@cache
def _splits(task: str) -> tuple[DataSplit, DataSplit, int]:
    """Return the training split, the test split and the number of outputs of a task."""
    if task == REVIEWS:
        return _reviews()
    train, test = (read_tab(path) for path in _sources(task))
    names = sorted({label for label, _ in train})
    index = {name: number for number, name in enumerate(names)}

    def split(rows: Sequence[tuple[str, str]]) -> DataSplit:
        known = [(text, index[label]) for label, text in rows if label in index]
        return DataSplit(tuple(text for text, _ in known), tuple(label for _, label in known))

    return split(train), split(test), len(names)


def _reviews() -> tuple[DataSplit, DataSplit, int]:
    """Return rated snippets of film reviews (Hutto and Gilbert 2014), the last fifth of a fixed order as test split."""
    with tarfile.open(archive()) as outer, tarfile.open(fileobj=outer.extractfile(_INNER)) as inner:
        file = inner.extractfile(_RATED)
        assert file is not None
        lines = io.TextIOWrapper(file, encoding="utf-8", errors="replace").read().splitlines()
    rows = [(parts[2], float(parts[1]) / _SCALE) for parts in (line.split("\t") for line in lines) if len(parts) == 3]
    random.Random(0).shuffle(rows)
    cut = len(rows) * 4 // 5

    def split(some: Sequence[tuple[str, float]]) -> DataSplit:
        return DataSplit(tuple(text for text, _ in some), cast("tuple[int, ...]", tuple(rating for _, rating in some)))

    return split(rows[:cut]), split(rows[cut:]), 1
