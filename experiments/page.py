"""The page of results, docs/results.md, written from the stored cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from experiments import claims
from experiments import decoder_page as decoder
from experiments import drift_page as drift
from experiments import times_page as times
from experiments.cells import ROOT, SHOWN
from experiments.explaining import GATES, ROUNDED, causes, magnified, misses, named
from experiments.parity_plan import BATCHES, DTYPES, RATE, STEPS, compared
from experiments.store import FOLDER, Record, Store, replace
from experiments.summary_page import summary
from experiments.training_page import sections

PAGE = ROOT / "docs" / "results.md"
TITLES = {"minilm": "MiniLM", "smollm2": "SmolLM2-135M"}
COLUMNS: Mapping[str, str] = {
    "first_loss": "first loss",
    "gradients": "first gradients",
    "losses": f"losses of {STEPS} steps",
    "tensors": "final tensors",
    "merged": "merged",
}
_PARITY = compared()
ROUNDING: Mapping[str, str] = {"rounding": "graftc, from float64", "peft_rounding": "PEFT, from float64"}

_HEAD = f"""# Results

This page is written by `python -m experiments page` from stored cells: a cell is one run, and its figures are one
line of `experiments/cells/PART.jsonl` in a source checkout, with digests of the code that computes it, of the method's
modules and of the data, and with the versions of graftc (which stands for the rest of it), torch, transformers and
PEFT in the process that runs it (cells of [the drift](#drift) have those of their environment as well). The last
column of a table has the first {SHOWN} characters of the cell's digest. The command under a table
computes those of its cells that are missing or out of date; `make results` does so for all (`QUICK=1` tries it on tiny
models).
"""
_PARITY_HEAD = f"""## Parity with PEFT

Every type of adapter that [graftc and PEFT share](peft.md) trains from the same factors, on the same batches, with
the same optimiser, in both libraries. There are no seeds to average over: what differs is rounding, or is an error in
one of them. The cells were computed with one thread of a processor.

- **Models.** MiniLM is a classifier of Reuters R8 ({BATCHES["minilm"][0]} texts of at most {BATCHES["minilm"][1]}
  tokens in a batch) with a random head that does not train, so that all that trains is the method's.
  SmolLM2-135M continues the same texts ({BATCHES["smollm2"][0]} x {BATCHES["smollm2"][1]} tokens).
- **Factors.** graftc compiles the spec, adds noise (deviation 0.02) to every trained tensor so that none is zero, and
  exports the adapter; PEFT loads the folder. Adapters are on all linear maps of the layers with rank 8, where the
  method has a rank (AdaLoRA 12, VeRA 64) and does not have places of its own.
- **Training.** AdamW at the constant rate {RATE:g} without weight decay, {STEPS} steps in train mode, no dropout.
- **Figures.** *Trained* is the number of values that train. *First loss* and *losses* are differences over PEFT's loss,
  the largest of all steps for the latter.
  *First gradients* and *final tensors* are the largest difference of any entry over the largest entry of all of
  PEFT's, by the keys of PEFT's files. *Merged* is the largest difference of logits over the largest logit, where
  graftc merges the trained tensors, and PEFT loads and merges an export of them; `-` marks methods that do not merge.
- **Gates.** First loss and gradients within {GATES["float32"]["gradients"]:g} in float32 and
  {GATES["float64"]["gradients"]:g} in float64; losses within {GATES["float32"]["losses"]:g} and
  {GATES["float64"]["losses"]:g}. A figure that misses its gate is **bold**, with more digits if it would look like the
  gate. bfloat16 has no gate.
- **SmolLM2 in float64.** Whatever their dtype, transformers' decoders compute norms and loss in float32. Two values
  that differ by 1e-16 may be rounded to float32 in different directions, and then differ by 1e-7. In these cells, both
  libraries therefore get the same model with torch's norms, and with a loss in float64.
- **From float64.** How far the first gradients of each library are from those that PEFT computes in float64 from the
  same weights and factors: the rounding that both have anyway.

Not compared: P-tuning, since PEFT trains a network whose result alone is in the file; virtual tokens (prompts,
prefixes) on MiniLM, because PEFT's classifiers pool one of them; aLoRA on MiniLM, because it is for causal models.
"""


def write(folder: Path = FOLDER, page: Path = PAGE) -> None:
    """Write the page from the cells in a folder."""
    replace(page, text(folder).encode())


def text(folder: Path = FOLDER) -> str:
    """Return the page."""
    # An interrupted run may leave a cell twice; the later record is the one that its code computes now.
    stored = (record for part in ("parity", "exact") for record in Store(part, folder).records().values())
    latest = {str(record.cell): record for record in stored}
    order = {str(cell): number for number, cell in enumerate(_PARITY)}
    shown = sorted(latest.values(), key=lambda record: order.get(str(record.cell), len(order)))
    training = (*sections(folder), *decoder.section(folder), *claims.section(folder))
    rest = (*drift.section(folder), *times.section(folder))
    parts = (_HEAD, *summary(folder), _PARITY_HEAD, *_parity(shown), "", *training, *rest)
    return "\n".join(parts).rstrip("\n") + "\n"


def _parity(records: Sequence[Record]) -> Iterator[str]:
    planned = Counter((cell.model, cell.dtype) for cell in _PARITY)
    parts = {(cell.model, cell.dtype): cell.part for cell in _PARITY}
    for model, title in TITLES.items():
        for dtype in DTYPES:
            rows = [own for own in records if (own.cell.model, own.cell.dtype) == (model, dtype)]
            yield f"### {title}, {dtype}\n"
            if rows:
                yield from _table(rows, dtype)
            if missing := planned[model, dtype] - len(rows):
                yield f"\n{missing} cells of this table have not been computed yet."
            part = parts[model, dtype]
            yield f"\n```\npython -m experiments {part} --only {part}/{model}/{dtype}\n```\n"
    yield "### What does not hold\n"
    yield from _statement(records)


def _table(records: Iterable[Record], dtype: str) -> Iterator[str]:
    extra = {} if dtype == "float64" else ROUNDING
    names = ["method", "trained", *COLUMNS.values(), *extra.values(), "cell"]
    yield f"| {' | '.join(names)} |"
    yield f"| --- |{' ---: |' * (len(names) - 2)} --- |"
    for record in records:
        missed = misses(record)
        gates = GATES.get(dtype, {})
        values = [figure(record.figures.get(name), name in missed, gates.get(name)) for name in (*COLUMNS, *extra)]
        digest = f"`{record.digest[:SHOWN]}`"
        yield f"| {' | '.join([named(record.cell.name), _trained(record.figures), *values, digest])} |"


def _trained(figures: Mapping[str, int]) -> str:
    ours, theirs = figures["parameters"], figures["peft_parameters"]
    return f"{ours:,}" if ours == theirs else f"{ours:,} (PEFT: {theirs:,})"


def figure(value: float | None, missed: bool = False, gate: float | None = None) -> str:
    """Return a figure as it is shown; one that misses its gate has enough digits to show it."""
    if value is None:
        return "-"
    shown = "0" if value == 0 else f"{value:.1e}"
    if missed and gate is not None:
        shown = next((more for digits in range(1, 9) if float(more := f"{value:.{digits}e}") > gate), shown)
    return f"**{shown}**" if missed else shown


def _statement(records: Sequence[Record]) -> Iterator[str]:
    gated = [own for own in records if own.cell.dtype in GATES]
    wrong = [own for own in gated if misses(own)]
    yield f"{len(gated) - len(wrong)} of {len(gated)} cells in float32 and float64 are within all gates."
    if wrong:
        yield f"The other {len(wrong)} are not, and nothing was tuned to make them pass:\n"
    for cause, rows in causes(gated).items():
        places = [f"{named(own.cell.name)} ({TITLES[own.cell.model]}, {own.cell.dtype})" for own in rows]
        example = f" {text}" if cause == ROUNDED and (text := magnified(gated)) else ""
        yield f"- {cause}{example} Missed by: {', '.join(places)}."
