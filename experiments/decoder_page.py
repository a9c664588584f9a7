"""The section of the page about the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments.decoder_plan import BATCH, NEW_TOKENS, RECORDS, ROWS, SEEDS, STEPS, TESTED, DecoderSetting
from experiments.grammar import HELD_OUT, REFERENCES, TRAINED
from experiments.rows import Table, Trained, digests, rate_of
from experiments.store import FOLDER
from experiments.training_page import LEAST, unit

MEASURES = {
    "loss_seen": "loss, seen",
    "loss_unseen": "loss, unseen",
    "bleu_seen": "BLEU, seen",
    "bleu_unseen": "BLEU, unseen",
    "chrf_unseen": "chrF, unseen",
}
_HEAD = f"""## Training a decoder

SmolLM2-135M-Instruct learns to turn records, such as `type: museum | name: Gilda | opening year: 1896`, into sentences
of a seeded grammar. It trains on {RECORDS} records of {len(TRAINED)} categories, {STEPS} steps of {BATCH} records;
{len(HELD_OUT)} other categories, with attributes of their own, are *unseen*. Rates are swept as for the encoder, and
chosen by the loss on {TESTED} further records of seen categories; {len(SEEDS)} seeds. Training is as for the
encoder, for SpIEL with its own AdamW. *full* trains the weights of all linear maps of the layers, gates included, which
are {{full}} of 135 million values: no embeddings and no norms. *prefix* and *prompt* have 16 vectors.

*Trained* is the number of values that train, *rate* the best rate, with `*` if it is at the end of its sweep. *Loss* is
the mean cross-entropy of a token of the target, in nats, on {TESTED} records. BLEU and chrF (sacrebleu's defaults)
compare what the model writes, the most likely token at each step and at most {NEW_TOKENS} tokens, with {REFERENCES}
sentences of the grammar. All are means over seeds with intervals as above. LoRA's alpha is 16 at every rank. *Step* and
*peak* are as above.
"""


def section(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the section."""
    table = Table(DecoderSetting(), ROWS, folder)
    full = table.rows.get("full")
    yield _HEAD.format(full="most" if full is None else f"{full.trained / 1e6:.0f}")
    if table.rows:
        yield f"| {' | '.join(('method', 'trained', 'rate', *MEASURES.values(), 'step', 'peak', 'cells'))} |"
        yield f"| --- |{' ---: |' * (len(MEASURES) + 4)} --- |"
        yield from map(_line, table.rows.values())
        yield f"\n{LEAST.format(names='Step and peak')}\n"
    yield from table.ending("decoder")


def worse(own: Trained, other: Trained) -> list[str]:
    """Return the measures on which a row is worse than another, with the differences of cells of the same seed."""
    differences = []
    for name, title in MEASURES.items():
        over, is_loss = own.over(other, name), name.startswith("loss")
        if over.is_above_zero if is_loss else over.is_below_zero:
            kind, _, group = title.partition(", ")
            differences.append(f"{group} {kind} ({over.shown(3 if is_loss else 1, sign='+')})")
    return differences


def _line(own: Trained) -> str:
    values = (
        f"{own.trained:,}",
        rate_of(own),
        *(own.interval(name).shown(3 if name.startswith("loss") else 1) for name in MEASURES),
        unit(own.time("step_ms"), "ms"),
        unit(own.time("peak_mb"), "MiB"),
    )
    return f"| {' | '.join((own.row.name, *values, digests(own)))} |"
