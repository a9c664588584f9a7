"""The section of the page about the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments.decoder_plan import BATCH, NEW_TOKENS, RECORDS, ROWS, SEEDS, STEPS, TESTED, DecoderSetting
from experiments.grammar import HELD_OUT, REFERENCES, TRAINED
from experiments.rows import Table, Trained, digests, rate_of
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
    table = Table(DecoderSetting(), ROWS, folder)
    if table.rows:
        yield f"| {' | '.join(('method', 'trained', 'rate', *_COLUMNS.values(), 'step', 'peak', 'cells'))} |"
        yield f"| --- |{' ---: |' * (len(_COLUMNS) + 4)} --- |"
        yield from map(_line, table.rows.values())
        yield ""
    yield from table.ending("decoder")


def _line(own: Trained) -> str:
    values = (
        f"{own.trained:,}",
        rate_of(own),
        *(own.interval(name).shown(3 if name.startswith("loss") else 1) for name in _COLUMNS),
        unit(own.time("step_ms"), "ms"),
        unit(own.time("peak_mb"), "MB"),
    )
    return f"| {' | '.join((own.row.name, *values, digests(own)))} |"
