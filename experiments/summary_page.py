"""The section of the page that answers in short which method to take, what it costs and what is not known."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from experiments.decoder_page import MEASURES, worse
from experiments.decoder_plan import ROWS as DECODER_ROWS
from experiments.decoder_plan import DecoderSetting
from experiments.rows import Table, Trained, digests, digests_of, listed
from experiments.store import FOLDER
from experiments.tasks import VALIDATION
from experiments.training_page import TITLES, identical, percent, points, sampling, tables, unit
from experiments.training_plans import (
    ALONE,
    ALONE_FIXED,
    BATCH,
    COMPARED,
    FLOORS,
    MANY,
    PER_CLASS,
    REPEATED,
    SEEDS,
    STEPS,
)

_HEAD = f"""## In short

Differences are means over {len(SEEDS)} seeds ({len(DecoderSetting().seeds)} for the decoder) of those between cells of
the same seed, with 95 % intervals that are not corrected for the number of comparisons. A difference is not
distinguishable if its interval contains zero, which a mean with a wide interval does more easily than a higher one with
a narrow interval. *full* trains the weights of all linear maps of the layers, not embeddings, biases and norms. A name
with `*` is of a row whose best rate is at the end of its sweep. The cells are those of the best row, and the first of
each row compared with it.
"""


def summary(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the section."""
    yield _HEAD
    yield "| question | answer | cells |"
    yield "| --- | --- | --- |"
    some = tables(folder)
    for number, table in enumerate(some):
        amount = f"up to {PER_CLASS} texts a class" if number == 0 else f"{MANY:,} texts"
        question = f"Which method for {amount} ({TITLES[table.task]})?"
        yield f"| {question} | {' | '.join(_answer(table))} |"
    decoder = Table(DecoderSetting(), DECODER_ROWS, folder)
    yield f"| Which method for a decoder (SmolLM2, records into sentences)? | {' | '.join(_of_decoder(decoder))} |"
    if some[0].rows:
        yield f"| What does it cost? | {_costs(some)} | see the columns below |"
    yield f"| What is not known? | {_unknown(some)} | |\n"
    yield "```\npython -m experiments page\n```\n"


def _answer(table: Table) -> tuple[str, str]:
    """Return an answer and its cells."""
    best = table.best()
    if best is None:
        return "not computed yet", ""
    complete, repeated = table.complete, table.repeated
    if len(complete) == 1:
        return f"only {_figure(best)} has all its seeds, of {repeated} rows", digests(best)
    others = [own for own in complete if own is not best]
    equal = table.as_good(best)
    lower = [own for own in others if own not in equal]
    answer = f"{_figure(best)} has the highest mean"
    if len(complete) < repeated:
        answer += f" of {len(complete)} rows with all seeds, of {repeated} planned"
    answer = _nothing_beats_the_head(complete) + answer
    answer += f". Not distinguishable from it: {_several(_difference(own, best) for own in equal)}"
    answer += f". Below it: {_several(_difference(own, best) for own in lower)}"
    first = digests_of(own.records[0] for own in others)
    return answer, f"{digests(best)}; {first}"


def _nothing_beats_the_head(complete: Sequence[Trained]) -> str:
    """Return that no method is above the head alone, if it is so."""
    alone = next((own for own in complete if own.row.name == ALONE), None)
    methods = [own for own in complete if own.row.name not in FLOORS]
    if alone is None or not methods or any(own.over(alone).is_above_zero for own in methods):
        return ""
    return f"**No method is above training the head alone** ({percent(alone.interval())}): "


def _figure(own: Trained) -> str:
    """Return a row's name with its interval."""
    return f"{_marked(own)} ({percent(own.interval())})"


def _difference(own: Trained, best: Trained) -> str:
    """Return a row's name with its differences from the best row."""
    return f"{_marked(own)} ({points(own.over(best))})"


def _several(names: Iterable[str]) -> str:
    """Return names as text; some have commas of their own."""
    return "; ".join(names) or "none"


def _marked(own: Trained) -> str:
    return f"{own.row.name}{'*' if own.is_at_the_end else ''}"


def _of_decoder(table: Table) -> tuple[str, str]:
    """Return what distinguishes the decoder's rows from full fine-tuning, and the cells."""
    full = next((own for own in table.complete if own.row.name == "full"), None)
    others = [own for own in table.complete if own is not full]
    if full is None or not others:
        return "not computed yet", ""
    shown = {_marked(own): worse(own, full) for own in others}
    equal = [name for name, figures in shown.items() if not figures]
    answer = f"Not distinguishable from full on any of {len(MEASURES)} measures: {_several(equal)}"
    lower = [f"{name} on {', '.join(figures)}" for name, figures in shown.items() if figures]
    return f"{answer}. Worse: {_several(lower)}", f"{digests(full)}; {digests_of(own.records[0] for own in others)}"


def _costs(some: Sequence[Table]) -> str:
    """Return times relative to full fine-tuning, with what they are worth, memory and sizes."""
    table = some[0]
    steps = _measured(table, "step_ms")
    if not steps.keys() >= {ALONE, "full"}:
        return "not computed yet"
    ratios = {name: value / steps["full"] for name, value in steps.items() if name not in ("full", ALONE_FIXED)}
    noise = identical(some)
    cheaper = [name for name, ratio in ratios.items() if ratio * noise < 1]
    values = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in ratios.items())
    parts = [f"Step time relative to full fine-tuning on {TITLES[table.task]}: {values}"]
    if cheaper:
        spread = max(own.spread("step_ms") for each in some for own in each.rows.values())
        parts.append(
            f"The same computation differed by up to {noise:.1f} times between two rows, and by up to {spread:.1f} "
            f"times between cells of one row, so that only {listed(cheaper)} is clearly cheaper in time"
        )
    peaked = next((each for each in some[1:] if "full" in _measured(each, "peak_mb")), None)
    if peaked is not None:
        peaks = "; ".join(f"{name}: {unit(value, 'MiB')}" for name, value in _measured(peaked, "peak_mb").items())
        parts.append(f"Peak memory of the process on {TITLES[peaked.task]}: {peaks}")
    sizes = {own.row.name: own.records[0].figures["bytes"] / 1e6 for own in _repeated(table) if own.values("bytes")}
    if sizes:
        least, most = min(sizes, key=lambda name: sizes[name]), max(sizes, key=lambda name: sizes[name])
        parts.append(
            f"Saved adapter with its head: from {sizes[least]:.2f} MB ({least}) to {sizes[most]:.2f} MB ({most})"
        )
    return ". ".join(parts)


def _repeated(table: Table) -> list[Trained]:
    return [own for own in table.rows.values() if own.planned > 1]


def _measured(table: Table, time: str) -> Mapping[str, float]:
    values = {own.row.name: own.time(time) for own in _repeated(table)}
    return {name: value for name, value in values.items() if value is not None}


def _unknown(some: Sequence[Table]) -> str:
    table = some[0]
    single = sum(own.planned == 1 for own in table.rows.values())
    missing = table.planned - len(table.rows)
    apart = [row.name for row, repeated in REPEATED.items() if repeated and row not in COMPARED]
    one_seed = sum(not repeated for repeated in REPEATED.values())
    parts = [
        f"{single} methods were run with one seed on {TITLES[table.task]}, too few to rank them (AdaMix has "
        f"{len(SEEDS)} seeds under Claims, PASTA 3)"
    ]
    if missing:
        parts.append(f"{missing} have not been computed yet")
    parts.append(f"{', '.join(apart)} and the {one_seed} methods with one seed were not run with {MANY:,} texts")
    errors = [f"{100 * half:.1f} ({TITLES[each.task]})" for each in some if (half := sampling(each)) is not None]
    if errors:
        parts.append(f"other test texts could move a score by about ± {', '.join(errors)}, which no interval covers")
    parts.append(f"rates were chosen by {VALIDATION} labelled texts more than those that train")
    parts.append(
        f"there is one encoder of 22.6 million parameters and one decoder of 135 million; texts of at most {BATCH[1]} "
        f"tokens and {STEPS} steps for the encoder"
    )
    parts.append("larger models, longer training, languages other than English, and other heads were not tried")
    return "; ".join(parts)
