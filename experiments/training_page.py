"""The sections of the page about training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.pictures import shown
from experiments.rows import Interval, Table, Trained, digests, listed, rate_of
from experiments.store import FOLDER
from experiments.tasks import REVIEWS, TESTED, VALIDATION
from experiments.training_plans import (
    ALONE,
    ALONE_FIXED,
    BATCH,
    COMPARED,
    FLOOR,
    FLOORS,
    HEAD_RATE,
    MANY,
    MOST_RATES,
    PER_CLASS,
    REPEATED,
    SEEDS,
    STEPS,
    encoder_settings,
    task_settings,
)

TITLES = {
    "r52": "Reuters R52",
    "r8": "Reuters R8",
    "20newsgroups": "20 Newsgroups",
    "reviews": "ratings of film reviews, 100 times Pearson's correlation",
}
_SHORT = {"r52": "on R52", "r8": "on R8", "20newsgroups": "on 20 Newsgroups", "reviews": "for ratings"}
LEAST = "{names} are the least of all the row's cells, those of its sweep included."
"""The sentence below a table that has times."""
_COLUMNS = (
    "method",
    "trained",
    "rate",
    "test",
    "first seed",
    "over the head alone",
    "macro-F1",
    "tensors",
    "step",
    "peak",
    "fold",
)
_HEAD = f"""## Training an encoder

MiniLM (22.6 million parameters) with a linear head on the mean of its last hidden states. The head trains in every
row, at the rate {HEAD_RATE:g} except in *{ALONE}*. Methods are on all linear maps of the layers with rank 8, where they
have a rank (alpha 16, where they have one), and are otherwise placed and sized as in their papers.

- **Full.** Full fine-tuning usually trains everything. Here *full* trains the weights of the linear maps of the layers
  (queries, keys, values, outputs, and both maps of the MLP), about half of the model; embeddings, biases and
  norms keep their values.
- **Sizes.** *prefix* and *prompt* have 16 vectors, *rows* trains a tenth of the rows of each linear map, *mask* 0.5 %
  of all values and *LT-SFT* 1 %, *last layers* two layers.
- **Training.** {STEPS} steps of {BATCH[0]} texts of at most {BATCH[1]} tokens, AdamW without weight decay, a rate that
  rises over a tenth of the steps and falls to zero, gradients clipped to 1. The model's dropout is on. SpIEL moves
  values to other entries while it trains; its AdamW is `graftc.optim.AgedAdamW`, which counts the steps of each entry
  since it was added, and is AdamW for everything else ([spiel](methods/spiel.md)).
- **Rates.** Three rates a factor of about three apart; as long as the best is at an end, the sweep is extended there,
  to at most {MOST_RATES} rates. The best has the highest accuracy (for ratings, correlation) on {VALIDATION} labelled
  texts that are neither trained on nor tested with; among rates with equal accuracy, it
  has the lowest loss on them. So a row uses more labels than the table's title says. *Rate* is the best one,
  the highest that the schedule reaches; one with `*` is at the end of its sweep.
- **Seeds.** {len(SEEDS)} at the best rate for some methods, one for the others. A seed determines which texts train and
  which choose the rate, their order, the head's and the method's initial values, and dropout. Sweeps use the first.
- **Figures.** *Trained* is the number of values that train besides the head; in the row
  *{FLOOR}*, all of its values.
  *Test* is the accuracy in percent after the last step on {TESTED} texts of the test split, drawn evenly from the
  classes and the same in all cells: the mean over seeds, with the 95 % interval of Student's t. For ratings it is 100
  times Pearson's correlation. *Over the head alone* is the mean of the differences between cells of the same seed, with
  its interval; **bold** if the interval does not contain zero. *First seed* compares rows with several seeds to those
  with one. *Macro-F1* is the mean of the classes' F1, times 100. *Tensors*: size of the saved adapter with its head, in
  MB of 10^6 bytes; sparse methods save an index with each value (SpIEL's tensors are six times LoRA's with as many
  values). *Step*: median time on one thread. *Peak*: memory of the whole process in MiB of 2^20 bytes; `-` where it was
  not measured. *Fold*: time of a certified merge; `-` if a method does not fold.
- **Times.** The cells were computed two at a time on a machine with two cores that had other work at times.{{noise}}
- **Floors.** The *{FLOOR}* is logistic regression on MiniLM's frozen sentence embeddings, the strength of its penalty
  chosen by cross-validation on the training texts; for ratings it is ridge regression with a penalty of 1 (tried by
  hand, the best of seven from 0.01 to 10 is 1.1 points better on the first seed). *{ALONE}* sweeps the head's rate;
  *{ALONE_FIXED}* trains it at the rate that it has in all other rows.
- **What intervals do not cover.** The choice of the {TESTED} test texts{{sampling}}, that rates were chosen on
  the first seed, which counts in the mean, and that many rows are compared. Where the rate of
  *{ALONE}* differs from {HEAD_RATE:g}, the methods may also be better with a rate of their own for the head. Of
  R52's 52 classes, 27 have texts left over that choose the rate.
- **Several seeds elsewhere.** AdaMix has {len(SEEDS)} seeds and PASTA 3 under [Claims](#claims), in cells of their own.
- **Texts.** The film reviews are the rated snippets of Hutto and Gilbert (2014, VADER), a regression from -1 to 1.
- **Stages.** LT-SFT and diff pruning train in two stages of half the steps each; *trained* is that of the last one.
  Pruning reaches its 15 % within the steps, at one rate for weights and scores, and ends at a constant answer:
  its paper trains for epochs, with rates of their own. Bapna-Firat does not start from the base's function.
"""


def tables(folder: Path = FOLDER) -> list[Table]:
    """Return the tables of the encoder: the one with all methods, and those of the tasks."""
    first = [Table(setting, REPEATED, folder) for setting in encoder_settings()]
    return [*first, *(Table(setting, COMPARED, folder) for setting in task_settings())]


def sections(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the sections with the tables of training."""
    some = tables(folder)
    yield _HEAD.format(noise=_noise(some), sampling=_sampling(some))
    first, *others = some
    title = f"{TITLES[first.task]}, up to {PER_CLASS} texts a class ({encoder_settings()[0].texts} in all)"
    yield from _section(title, first, "encoder")
    yield from shown("parameters")
    yield from shown("rates")
    for table in others:
        name = TITLES[table.task]
        title = f"{name[0].upper()}{name[1:]}, {MANY:,} texts"
        yield from _section(title, table, f"tasks --only /{table.task}/")


def identical(some: Sequence[Table]) -> float:
    """Return the largest ratio of the step times of both rows that train the head alone, the same computation."""
    pairs = [[own.time("step_ms") for name in (ALONE, ALONE_FIXED) if (own := each.rows.get(name))] for each in some]
    known = [[value for value in pair if value is not None] for pair in pairs]
    return max((max(pair) / min(pair) for pair in known if len(pair) > 1), default=1.0)


def _noise(some: Sequence[Table]) -> str:
    rows = [own for table in some for own in table.rows.values()]
    if not rows:
        return ""
    spread = max(own.spread("step_ms") for own in rows)
    return (
        f" Cells of one row\n  do the same work at any rate, and their steps differ by up to {spread:.1f} times; the "
        f"least steps of *{ALONE}* and\n  *{ALONE_FIXED}*, the same computation, by up to {identical(some):.1f} times. "
        "Smaller differences between\n  rows say nothing."
    )


def sampling(table: Table) -> float | None:
    """Return the half width of the 95 % interval that other test texts would give LoRA's score; None without it.

    An accuracy is a share of independent texts; a correlation is that of a normal distribution.
    """
    own = table.rows.get("LoRA")
    if own is None:
        return None
    mean = own.interval().mean
    if table.task == REVIEWS:
        return 1.96 * (1 - mean**2) / math.sqrt(TESTED)
    return 1.96 * math.sqrt(mean * (1 - mean) / TESTED)


def _sampling(some: Sequence[Table]) -> str:
    halves = {table.task: half for table in some if (half := sampling(table)) is not None}
    if not halves:
        return ""
    shown = ", ".join(f"± {100 * half:.1f} {_SHORT[task]}" for task, half in halves.items())
    return f" (95 % intervals of LoRA's score alone: {shown}; less for\n  differences, which are on the same texts)"


def _section(title: str, table: Table, command: str) -> Iterator[str]:
    yield f"### {title}\n"
    if table.rows:
        yield from _table(table)
        yield f"\n{LEAST.format(names='Step, peak and fold')}\n"
        yield from _statement(table)
    yield from table.ending(command)


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join((*_COLUMNS, 'cells'))} |"
    yield f"| --- |{' ---: |' * (len(_COLUMNS) - 1)} --- |"
    alone = table.rows.get(ALONE)
    for own in table.rows.values():
        figures = own.records[0].figures
        over = own.over(alone) if alone is not None and own is not alone else None
        values = (
            f"{own.trained:,}",
            rate_of(own),
            percent(own.interval()),
            f"{100 * own.first:.1f}",
            "-" if over is None else signed(over),
            percent(own.interval("macro_f1")) if own.values("macro_f1") else "-",
            size(figures["bytes"]) if "bytes" in figures else "-",
            unit(own.time("step_ms"), "ms"),
            unit(own.time("peak_mb"), "MiB"),
            unit(own.time("fold_s"), "s", 1),
        )
        yield f"| {' | '.join((own.row.name, *values, digests(own)))} |"


def _statement(table: Table) -> Iterator[str]:
    """Yield what the table says of the head alone, of rows with several seeds."""
    alone = table.rows.get(ALONE)
    if alone is None:
        return
    repeated = [own for own in table.rows.values() if own is not alone and len(own.records) > 1]
    methods = [own for own in repeated if own.row.name not in FLOORS]
    floors = [own for own in repeated if own not in methods]
    several = f"{len(SEEDS)} seeds" if all(own.is_complete for own in methods) else "several seeds"
    lines = [
        f"Of the {kind}, above the head alone: {_compared(own, alone)}."
        for kind, own in ((f"methods with {several}", methods), ("other floors", floors))
        if own
    ]
    if lines:
        yield f"{' '.join(lines)}\n"


def _compared(others: Sequence[Trained], alone: Trained) -> str:
    above = [own.row.name for own in others if own.over(alone).is_above_zero]
    below = [own.row.name for own in others if own.over(alone).is_below_zero]
    rest = [own.row.name for own in others if own.row.name not in (*above, *below)]
    return f"{listed(above)}. Below it: {listed(below)}. Not distinguishable: {listed(rest)}"


def percent(interval: Interval) -> str:
    """Return an interval in percent."""
    return interval.shown(scale=100)


def points(interval: Interval) -> str:
    """Return an interval of differences in points."""
    return interval.shown(scale=100, sign="+")


def signed(interval: Interval) -> str:
    """Return an interval of differences in points, in bold if it does not contain zero."""
    shown = points(interval)
    return f"**{shown}**" if interval.is_above_zero or interval.is_below_zero else shown


def size(count: int) -> str:
    """Return a number of bytes in megabytes, with a significant digit however small it is."""
    shown = f"{count / 1e6:.2f}"
    return f"{shown if float(shown) else f'{count / 1e6:.1g}'} MB"


def unit(value: float | None, unit: str, digits: int = 0) -> str:
    """Return a value with its unit, or a dash."""
    return "-" if value is None else f"{value:.{digits}f} {unit}"
