"""The section of the page about the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments.decoder_plan import BATCH, NEW_TOKENS, RECORDS, ROWS, SEEDS, STEPS, TESTED, DecoderSetting
from experiments.grammar import HELD_OUT, REFERENCES, TRAINED
from experiments.rows import Interval, Table, Trained, digests
from experiments.store import FOLDER
from experiments.training_page import unit

_COLUMNS = {
    "loss_seen": "loss, seen",
    "loss_unseen": "loss, unseen",
    "bleu_seen": "BLEU, seen",
    "bleu_unseen": "BLEU, unseen",
    "chrf_unseen": "chrF, unseen",
}
_HEAD = f"""## Training a decoder

SmolLM2-135M-Instruct learns to say a record, such as `type: museum | name: Gilda | opening year: 1896`, in sentences
from a seeded grammar. It trains on {RECORDS} records of {len(TRAINED)} categories, {STEPS} steps of {BATCH} records;
{len(HELD_OUT)} other categories, with attributes of their own, are *unseen*. Rates are swept as for the encoder, and
chosen by the loss on {TESTED} further records of seen categories; {len(SEEDS)} seeds.

*Loss* is that of a token of the target on {TESTED} records. BLEU and chrF (sacrebleu's defaults) compare what the model
writes, the most likely token at each step and at most {NEW_TOKENS} tokens, with {REFERENCES} sentences of the grammar.
All are means over seeds with intervals as above. LoRA's alpha is 16 at every rank.
"""


def section(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the section."""
    yield _HEAD
    table = Table(DecoderSetting(), {row: row.fields is not None for row in ROWS.values()}, folder)
    if table.rows:
        yield f"| {' | '.join(('method', 'trained', 'rate', *_COLUMNS.values(), 'step', 'peak', 'cells'))} |"
        yield f"| --- |{' ---: |' * (len(_COLUMNS) + 4)} --- |"
        yield from map(_line, table.rows.values())
        yield ""
    missing = table.planned - len(table.rows)
    if missing:
        yield f"{missing} of {table.planned} rows have not been computed yet.\n"
    yield "```\npython -m experiments decoder\n```\n"


def _line(own: Trained) -> str:
    rate = own.records[0].cell.rate
    values = (
        f"{own.records[0].figures['trained']:,}",
        (f"{rate:g}" + ("*" if own.is_at_the_end else "")) if rate else "-",
        *(_shown(own.interval(name), 3 if name.startswith("loss") else 1) for name in _COLUMNS),
        unit(own.time("step_ms"), "ms"),
        unit(own.time("peak_mb"), "MB"),
    )
    return f"| {' | '.join((own.row.name, *values, digests(own)))} |"


def _shown(interval: Interval, digits: int) -> str:
    mean = f"{interval.mean:.{digits}f}"
    return mean if interval.half != interval.half else f"{mean} ± {interval.half:.{digits}f}"
