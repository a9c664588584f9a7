"""The sections of the page about training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.pictures import shown
from experiments.rows import Interval, Table, Trained, digests, rate_of
from experiments.store import FOLDER
from experiments.tasks import TESTED, VALIDATION
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
    "reviews": "ratings of film reviews, by Pearson's correlation",
}
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
row, at the rate {HEAD_RATE:g}; methods are on all linear maps of the layers with rank 8, where they have a rank, and
have their papers' places and sizes otherwise.

- **Training.** {STEPS} steps of {BATCH[0]} texts of at most {BATCH[1]} tokens, AdamW without weight decay, a rate that
  rises over a tenth of the steps and falls to zero, gradients clipped to 1. The model's dropout is on.
- **Rates.** Three rates a factor of about three apart; while the best is at an end, the next one there, up to
  {MOST_RATES}. The best has the highest accuracy on {VALIDATION} texts that are neither trained on nor tested with.
  A rate with `*` is still at the end of its sweep.
- **Seeds.** {len(SEEDS)} at the best rate for some methods, one for the others. A seed determines which texts train and
  which choose the rate, their order, the head's and the method's initial values, and dropout. Sweeps use the first.
- **Figures.** *Test* is the accuracy after the last step on {TESTED} texts of the test split, drawn evenly from the
  classes and the same in all cells: the mean over seeds, with the 95 % interval of Student's t. *Over the head alone*
  is the mean of the differences between cells of the same seed, with its interval; **bold** if the interval does not
  contain zero. *First seed* compares rows with several seeds to those with one. *Tensors*: size of the saved adapter
  with its head. *Step*: median time on one thread. *Peak*: memory of the whole process. *Fold*: time of a certified
  merge; `-` if a method does not fold. Times are the least of the row's cells, which were computed two at a time on a
  machine with two cores that had other work at times: differences below a factor of two mean little.
- **Floors.** *{FLOOR}*: logistic regression on MiniLM's frozen sentence embeddings, the strength of its penalty chosen
  by cross-validation on the training texts; for ratings ridge regression with a penalty of 1 (of seven from 0.01 to
  10, the best is 1.1 points better on the first seed). *{ALONE}* sweeps the head's rate; *{ALONE_FIXED}*
  trains it at the rate that it has in all other rows.
- **What intervals do not cover.** The choice of the {TESTED} test texts (some 1.7 points), that rates were chosen on
  the first seed, which counts in the mean, and that many rows are compared. Where the rate of
  *{ALONE}* is another than {HEAD_RATE:g}, the methods may also be better with a rate of their own for the head. Of
  R52's 52 classes, 27 have texts left over that choose the rate.
- **Stages.** LT-SFT and diff pruning train in two stages of half the steps each; *trained* is that of the last one.
  Pruning reaches its 15 % within the steps, at one rate for weights and scores, and ends at a constant answer:
  its paper trains for epochs, with rates of their own. Bapna-Firat does not start from the base's function.
"""


def summary(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the table that answers which method to take."""
    yield "## In short\n"
    yield "| question | answer | cells |"
    yield "| --- | --- | --- |"
    settings = [(f"{PER_CLASS} texts a class", encoder_settings()[0], REPEATED)]
    settings += [(f"{MANY:,} texts", setting, COMPARED) for setting in task_settings()]
    for amount, setting, names in settings:
        table = Table(setting, names, folder)
        best = table.best()
        question = f"Which method for {amount} ({TITLES[setting.task]})?"
        if best is None:
            yield f"| {question} | not computed yet | |"
            continue
        others = [name_and_figure(own) for own in table.as_good(best)]
        complete, repeated = len(table.complete), sum(names.values())
        if complete == 1:
            only = f"only {name_and_figure(best)} has all its seeds, of {repeated} rows"
            yield f"| {question} | {only} | {digests(best)} |"
            continue
        answer = f"{name_and_figure(best)} is the highest mean"
        if complete < repeated:
            answer += f" of {complete} rows with all seeds, of {repeated} planned"
        answer += f"; not distinguishable from it: {', '.join(others)}" if others else "; the others are below it"
        yield f"| {question} | {answer} | {digests(best)} |"
    table = Table(settings[0][1], REPEATED, folder)
    if table.rows:
        yield f"| What does it cost? | {_costs(table)} | see the columns below |"
    yield f"| What is not known? | {_unknown(table)} | |\n"


def name_and_figure(own: Trained) -> str:
    """Return a row's name with its interval."""
    return f"{own.row.name} ({percent(own.interval())})"


def _costs(table: Table) -> str:
    measured = {name: own.time("step_ms") for name, own in table.rows.items()}
    steps = {name: value for name, value in measured.items() if value is not None}
    if not steps.keys() >= {ALONE, "full"}:
        return "not computed yet"
    shown = [
        f"{name} {steps[name] / steps['full']:.2f}" for name in steps if table.rows[name].planned > 1 and name != "full"
    ]
    return f"Time of a step over full fine-tuning's: {', '.join(shown)}"


def _unknown(table: Table) -> str:
    single = sum(own.planned == 1 for own in table.rows.values())
    missing = table.planned - len(table.rows)
    parts = [f"{single} methods have one seed, which orders nothing"]
    if missing:
        parts.append(f"{missing} have not been computed yet")
    parts.append("larger models, longer training, languages other than English, and other heads")
    return "; ".join(parts)


def sections(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the sections with the tables of training."""
    yield _HEAD
    for setting in encoder_settings():
        title = f"{TITLES[setting.task]}, {PER_CLASS} texts a class ({setting.texts} in all)"
        yield from _section(title, Table(setting, REPEATED, folder), "encoder")
        yield from shown("parameters")
        yield from shown("rates")
    for setting in task_settings():
        title = f"{TITLES[setting.task]}, {setting.texts:,} texts"
        yield from _section(title, Table(setting, COMPARED, folder), f"tasks --only /{setting.task}/")


def _section(title: str, table: Table, command: str) -> Iterator[str]:
    yield f"### {title}\n"
    if table.rows:
        yield from _table(table)
        yield ""
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
            f"{figures['bytes'] / 1e6:.2f} MB" if "bytes" in figures else "-",
            unit(own.time("step_ms"), "ms"),
            unit(own.time("peak_mb"), "MB"),
            unit(own.time("fold_s"), "s", 1),
        )
        yield f"| {' | '.join((own.row.name, *values, digests(own)))} |"


def _statement(table: Table) -> Iterator[str]:
    """Yield what the table says of the head alone."""
    alone = table.rows.get(ALONE)
    if alone is None:
        return
    others = [own for own in table.rows.values() if own.row.name not in FLOORS and len(own.records) > 1]
    if not others:
        return
    above = [own.row.name for own in others if own.over(alone).is_above_zero]
    below = [own.row.name for own in others if own.over(alone).is_below_zero]
    rest = [own.row.name for own in others if own.row.name not in (*above, *below)]
    yield f"Above the head alone: {_listed(above)}. Below it: {_listed(below)}. Not distinguishable: {_listed(rest)}.\n"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def percent(interval: Interval) -> str:
    """Return an interval in percent."""
    return interval.shown(scale=100)


def signed(interval: Interval) -> str:
    """Return an interval of differences in points, in bold if it does not contain zero."""
    shown = interval.shown(scale=100, sign="+")
    return f"**{shown}**" if interval.is_above_zero or interval.is_below_zero else shown


def unit(value: float | None, unit: str, digits: int = 0) -> str:
    """Return a value with its unit, or a dash."""
    return "-" if value is None else f"{value:.{digits}f} {unit}"
