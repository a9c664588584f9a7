"""Claims of papers and what their cells say: held, did not hold here, or cannot be said.

Each rule was written before its cells were computed. None has been changed since to make a claim hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.claims_plan import BATCHES, BY_PLACE, BY_RANK, FEW, LOW_DATA, MIXTURE, few, large_batches, usual
from experiments.pictures import shown
from experiments.probes_plan import (
    ATTENTION,
    COMPOSITION,
    DIRECTIONS,
    attention_setting,
    composition_setting,
    directions_setting,
    with_seeds,
)
from experiments.rows import Interval, Table, Trained, digests, digests_of
from experiments.store import FOLDER, Record
from experiments.tasks import VALIDATION
from experiments.training_plans import BATCH, LADDER, PER_CLASS, REPEATED, SEEDS, Row, encoder_settings

HELD, NOT_HELD, UNSAID, MISSING = "held", "did not hold here", "cannot be said", "not computed yet"


@dataclass(frozen=True)
class Verdict:
    """The verdict of the cells on a claim.

    Attributes:
        word: one of the four above.
        figure: the figures that decide.
        rows: the rows that they are from.
        reason: why nothing can be said.
        cells: the cells that decide, if they are not those of the rows at their best rates.
    """

    word: str
    figure: str = ""
    rows: Sequence[Trained] = ()
    reason: str = ""
    cells: Sequence[Record] = ()

    @property
    def digests(self) -> str:
        """The first characters of the digests of the cells that decide."""
        return digests_of(self.cells) if self.cells else " ".join(map(digests, self.rows))


@dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        text: what is claimed.
        source: the paper.
        rule: when it is said to hold.
        judge: a function that returns the verdict of the cells in a folder.
        part: the part that computes the cells which no table has.
    """

    text: str
    source: str
    rule: str
    judge: Callable[[Path], Verdict]
    part: str = "claims"


def rates_differ(folder: Path) -> Verdict:
    """Judge whether LoRA's best rate is about ten times that of full fine-tuning."""
    table = _encoder(folder)
    full, lora = table.rows.get("full"), table.rows.get("LoRA")
    if full is None or lora is None:
        return Verdict(MISSING)
    steps = LADDER.index(lora.rate) - LADDER.index(full.rate)  # of about a factor of three
    figure = f"{lora.rate:g} and {full.rate:g}: {lora.rate / full.rate:.2g} times; {_gaps((lora, full))}"
    return _of_sweeps(_verdict(HELD if 1 <= steps <= 3 else NOT_HELD, figure, (lora, full)))


def rate_is_that_of_every_rank(folder: Path) -> Verdict:
    """Judge whether the best rate is the same at every rank."""
    table = Table(usual(), dict.fromkeys(BY_RANK, False), folder)
    if len(table.rows) < len(BY_RANK):
        return Verdict(MISSING)
    rows = [*table.rows.values()]
    places = [LADDER.index(own.rate) for own in rows]
    figure = f"{'; '.join(f'{own.row.name}: {own.rate:g}' for own in rows)}; {_gaps(rows)}"
    return _of_sweeps(_verdict(HELD if max(places) - min(places) <= 1 else NOT_HELD, figure, rows))


def mlp_before_attention(folder: Path) -> Verdict:
    """Judge whether LoRA on the MLP is better than on attention with as many values."""
    first, second = BY_PLACE
    return _compared(_claims(folder, BY_PLACE), first.name, second.name)


def mixture_over_one(folder: Path) -> Verdict:
    """Judge whether AdaMix is better than one adapter with its bottleneck."""
    first, second = MIXTURE
    verdict = _compared(_claims(folder, MIXTURE), first.name, second.name)
    counts = " and ".join(f"{own.trained:,}" for own in verdict.rows)
    return replace(verdict, figure=f"{verdict.figure}; they train {counts} values") if verdict.rows else verdict


def sparse_over_low_rank(folder: Path) -> Verdict:
    """Judge whether SpIEL is better than LoRA with as many values."""
    return _compared(_encoder(folder), "SpIEL", "LoRA")


def biases_are_enough(folder: Path) -> Verdict:
    """Judge whether BitFit is at most a point below full fine-tuning."""
    return _compared(_encoder(folder), "BitFit", "full", margin=0.01)


def magnitude_helps(folder: Path) -> Verdict:
    """Judge whether DoRA is better than LoRA at the same rank."""
    return _compared(_encoder(folder), "DoRA", "LoRA")


def large_batches_cost_more(folder: Path) -> Verdict:
    """Judge whether large batches cost LoRA more than full fine-tuning."""
    small, large = _encoder(folder), Table(large_batches(), dict.fromkeys(BATCHES, True), folder)
    pairs = [(small.rows.get(name), large.rows.get(name)) for name in ("LoRA", "full")]
    rows = [own for pair in pairs for own in pair if own is not None and own.is_complete]
    if len(rows) < 4:
        return Verdict(MISSING)
    lora, full = (large.differences(small) for small, large in zip(rows[::2], rows[1::2], strict=True))
    costs = Interval.of([full[seed] - lora[seed] for seed in lora])
    figure = f"LoRA {_points(Interval.of([*lora.values()]))}, full {_points(Interval.of([*full.values()]))}"
    return _verdict(_word(costs, 0.0), f"{figure}; the difference is {_points(costs)}", rows, _unclear())


def prefixes_need_less_data(folder: Path) -> Verdict:
    """Judge whether a prefix is better than full fine-tuning with few texts, on the mean of the smallest two sizes."""
    shown, rows, lowest = [], list[Trained](), list[dict[int, float]]()
    for per_class in FEW:
        table = Table(few(per_class), dict.fromkeys(LOW_DATA, True), folder)
        full, prefix = (table.rows.get(row.name) for row in LOW_DATA)
        if full is None or prefix is None or not (full.is_complete and prefix.is_complete):
            return Verdict(MISSING)
        rows += [full, prefix]
        shown.append(f"{per_class}: {_points(prefix.over(full))}")
        if per_class in FEW[:2]:
            lowest.append(prefix.differences(full))
    # The texts of the smaller size are among those of the larger one: a seed counts once.
    both = Interval.of([statistics.fmean(size[seed] for size in lowest) for seed in lowest[0]])
    figure = f"prefix over full, {len(lowest[0])} seeds: one and two texts a class together {_points(both)}; "
    figure += f"by texts a class {', '.join(shown)}"
    return _verdict(_word(both, 0.0), figure, rows, _unclear(), deciding=rows[:4])


def changes_as_full_does(folder: Path) -> Verdict:
    """Judge whether DoRA's changes of magnitudes and directions correlate as in full fine-tuning, unlike LoRA's."""
    rows = _complete(Table(directions_setting(), with_seeds(DIRECTIONS), folder))
    if rows is None:
        return Verdict(MISSING)
    full, lora, dora = rows
    far, near = (own.differences(full, "correlation") for own in (lora, dora))
    nearer = Interval.of([abs(far[seed]) - abs(near[seed]) for seed in far])
    shown = ", ".join(f"{own.row.name} {own.interval('correlation').shown(2)}" for own in rows)
    figure = f"{shown}; DoRA is nearer to full by {nearer.shown(2, sign='+')}"
    return _verdict(_word(nearer, 0.0), figure, rows, _unclear())


def sparse_changes_add_up(folder: Path) -> Verdict:
    """Judge whether sparse changes that were trained on two tasks disturb each other less than dense ones."""
    rows = _complete(Table(composition_setting(), with_seeds(COMPOSITION), folder))
    if rows is None:
        return Verdict(MISSING)
    full, sparse = rows
    over, composed = sparse.over(full, "kept"), sparse.over(full, "composed")
    parts = ", ".join(f"{own.row.name} {_points(own.interval('kept'))}" for own in (sparse, full))
    figure = f"composed over alone: {parts}; the difference is {_points(over)}, of composed models {_points(composed)}"
    word, reason = _word(over, 0.0), _unclear()
    if word == HELD and not composed.is_above_zero:
        word, reason = UNSAID, "the interval of the composed models is not above zero"
    return _verdict(word, figure, rows, reason)


def special_tokens_are_attended(folder: Path) -> Verdict:
    """Judge whether some head of every layer attends mostly to special tokens, before and after training PASTA."""
    rows = _complete(Table(attention_setting(), with_seeds(ATTENTION), folder))
    if rows is None:
        return Verdict(MISSING)
    plain, _, pasta = rows
    over = [Interval.of([value - 0.5 for value in own.values("least")]) for own in (plain, pasta)]
    word = _word(over[1], 0.0) if over[0].mean > 0 else NOT_HELD
    parts = [f"{own.row.name} {own.interval('least').shown(scale=100)}" for own in rows]
    even = plain.interval("even").shown(scale=100)
    figure = f"percent of attention in the layer with least: {', '.join(parts)}; even shares: {even}"
    return _verdict(word, figure, rows, "the interval after training with PASTA contains a half", (plain, pasta))


def _complete(table: Table) -> list[Trained] | None:
    """Return the rows of a table; None unless all of them have all their cells."""
    rows = [*table.rows.values()]
    return rows if len(rows) == table.planned and all(own.is_complete for own in rows) else None


def _encoder(folder: Path) -> Table:
    return Table(encoder_settings()[0], REPEATED, folder)


def _claims(folder: Path, rows: Sequence[Row]) -> Table:
    return Table(usual(), dict.fromkeys(rows, True), folder)


def _compared(table: Table, first: str, second: str, margin: float = 0.0) -> Verdict:
    """Return whether a row is better than another by more than ``-margin``."""
    ours, theirs = table.rows.get(first), table.rows.get(second)
    if ours is None or theirs is None or not (ours.is_complete and theirs.is_complete):
        return Verdict(MISSING)
    over = ours.over(theirs)
    figure = f"{first} over {second}: {_points(over)}"
    return _verdict(_word(over, margin), figure, (ours, theirs), _unclear(margin))


def _verdict(
    word: str, figure: str, rows: Sequence[Trained], reason: str = "", deciding: Sequence[Trained] | None = None
) -> Verdict:
    """Return a verdict, which says nothing if the best rate of a deciding row (default: any) is at its sweep's end.

    Args:
        word: the verdict if it is not.
        figure: the figures that decide.
        rows: the rows that they are from.
        reason: why nothing can be said, if the word says so.
        deciding: the rows whose sweeps count.
    """
    reasons = [reason] if word == UNSAID else []
    if ends := [own for own in (rows if deciding is None else deciding) if own.is_at_the_end]:
        names = " and ".join(f"{own.row.name} ({own.rate:g})" for own in ends)
        reasons.append(f"the best rate of {names} is at the end of its sweep")
    return Verdict(UNSAID, figure, rows, "; ".join(reasons)) if reasons else Verdict(word, figure, rows)


def _of_sweeps(verdict: Verdict) -> Verdict:
    """Return a verdict on best rates, which the cells of the sweeps decide."""
    return replace(verdict, cells=[record for own in verdict.rows for record in own.swept])


def _gaps(rows: Sequence[Trained]) -> str:
    """Return by how many validation texts the best rates of rows are better than the next best."""
    gaps = ", ".join(f"{VALIDATION * own.gap:.0f}" for own in rows)
    return f"ahead of the next best rate by {gaps} of {VALIDATION} validation texts, on one seed"


def _unclear(margin: float = 0.0) -> str:
    """Return that an interval of differences contains the limit of a rule."""
    return f"the interval of the differences contains {f'-{100 * margin:g} point' if margin else 'zero'}"


def _word(interval: Interval, margin: float) -> str:
    """Return the verdict on "not below ``-margin``" by an interval of differences."""
    if interval.mean - interval.half > -margin:
        return HELD
    return NOT_HELD if interval.mean + interval.half < -margin else UNSAID


def _points(interval: Interval) -> str:
    return f"{interval.shown(scale=100, sign='+')} points"


_ABOVE = "the interval of the differences is above zero"
CLAIMS: Sequence[Claim] = (
    Claim(
        "The best learning rate of LoRA is about ten times that of full fine-tuning.",
        "Schulman et al. 2025, LoRA Without Regret",
        "the ratio of the best rates is from 3 to 30, and neither is at the end of its sweep",
        rates_differ,
    ),
    Claim(
        "The best learning rate of LoRA does not depend on the rank.",
        "Schulman et al. 2025, LoRA Without Regret",
        "with a constant alpha, best rates are at most one step of the sweep apart, and none is at its end",
        rate_is_that_of_every_rank,
    ),
    Claim(
        "LoRA belongs on the MLP before it belongs on attention.",
        "Schulman et al. 2025, LoRA Without Regret",
        f"with as many trained values, {_ABOVE}",
        mlp_before_attention,
    ),
    Claim(
        "Large batches cost LoRA more than they cost full fine-tuning.",
        "Schulman et al. 2025, LoRA Without Regret",
        f"batches four times as large, as many texts seen: {_ABOVE}",
        large_batches_cost_more,
    ),
    Claim("DoRA is better than LoRA at the same rank.", "Liu et al. 2024, DoRA", _ABOVE, magnitude_helps),
    Claim(
        "DoRA changes magnitudes and directions of weights more like full fine-tuning than LoRA does.",
        "Liu et al. 2024, DoRA",
        "the correlation of both changes over the layers, at four moments of training, is nearer to full fine-tuning's "
        "than LoRA's is: the interval of the difference of distances is above zero",
        changes_as_full_does,
        "directions",
    ),
    Claim(
        "With little data, a prefix is better than full fine-tuning.",
        "Li and Liang 2021, Prefix-Tuning",
        f"on R8 with one and two texts a class together, {_ABOVE}",
        prefixes_need_less_data,
    ),
    Claim(
        "A mixture of adapters is better than one adapter with its bottleneck.",
        "Wang et al. 2022, AdaMix",
        _ABOVE,
        mixture_over_one,
    ),
    Claim(
        "With little data, training biases alone is as good as full fine-tuning.",
        "Ben Zaken et al. 2022, BitFit",
        "the interval of the differences is above minus one point",
        biases_are_enough,
    ),
    Claim(
        "Sparse fine-tuning is better than LoRA with as many values.",
        "Ansell et al. 2024, SpIEL",
        _ABOVE,
        sparse_over_low_rank,
    ),
    Claim(
        "Sparse fine-tunings of two tasks can be added: they disturb each other less than dense ones.",
        "Ansell et al. 2022, LT-SFT",
        "R8 and 20 Newsgroups, 1,000 texts each; the figure is the mean accuracy of both tasks with both changes "
        f"added, less that with each task's own change; {_ABOVE}, and so is that of the composed models",
        sparse_changes_add_up,
        "composition",
    ),
    Claim(
        "Special tokens get much attention in every layer, so that vectors added to them reach the other tokens.",
        "Yang et al. 2023, PASTA",
        "in every layer, the head that attends to them most gives them over half of its attention, as the model is and "
        "after training with PASTA",
        special_tokens_are_attended,
        "attention",
    ),
)


_HEAD = """Each rule was written before its cells were computed. Differences are between cells of the same seed, with
the 95 % interval of their mean, and are not corrected for the number of claims. All are accuracies on Reuters R52 with
up to {per_class} texts a class and {seeds} seeds, unless a rule or a figure says otherwise; the claims on a prefix and
on PASTA have {few_seeds} seeds. *full* trains the weights of all linear maps of the layers, not embeddings, biases and
norms.

- A claim **held** if the figures meet the rule; an interval is then on the rule's side of its limit as a whole.
- It **did not hold here** if the figures contradict the rule; an interval is then on the other side as a whole.
- It **cannot be said** if an interval contains the limit of its rule, or the best rate of a compared row is at the end
  of its sweep. The reason is given; more seeds and texts, or more rates, could decide.

The first two claims compare best rates, each chosen on one seed by {validation} labelled texts, one of which is
{point:g} points: gaps of a text or two may be chance. Those {validation} texts choose the rates of all rows, also where
one text a class trains, which is therefore not learning from so few labels alone. With one text a class, a batch has
all {smallest} texts instead of {batch}. The differences for little data are paired; the intervals in
their picture are those of each row alone.
"""


def section(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the section of the page."""
    yield "## Claims\n"
    yield _HEAD.format(
        per_class=PER_CLASS,
        seeds=len(SEEDS),
        few_seeds=len(few(FEW[0]).seeds),
        validation=VALIDATION,
        point=100 / VALIDATION,
        smallest=few(FEW[0]).batch[0],
        batch=BATCH[0],
    )
    yield "| claim | rule | verdict | figures | cells |"
    yield "| --- | --- | --- | --- | --- |"
    for claim in CLAIMS:
        verdict = claim.judge(folder)
        word = f"**{verdict.word}**{f': {verdict.reason}' if verdict.reason else ''}"
        yield f"| {claim.text} ({claim.source}) | {claim.rule} | {word} | {verdict.figure} | {verdict.digests} |"
    commands = "\n".join(f"python -m experiments {part}" for part in dict.fromkeys(claim.part for claim in CLAIMS))
    yield f"\n```\n{commands}\n```\n"
    yield from shown("little-data")
