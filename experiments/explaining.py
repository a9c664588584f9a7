"""Gates of the parity table, and why cells miss them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from experiments.store import Record

GATES: Mapping[str, Mapping[str, float]] = {
    "float32": {"first_loss": 1e-6, "gradients": 1e-6, "losses": 1e-4},
    "float64": {"first_loss": 1e-12, "gradients": 1e-12, "losses": 1e-9},
}
"""The largest difference that each figure may have, by dtype."""

UNKNOWN = "**The cause is not known.**"
ROUNDED = (
    "**Rounding.** In float32 these figures exceed their gates, but in float64 the same figures of the same "
    "computations are within theirs. The last columns of the tables show how far the first gradients of each library "
    "are from those in float64: the gate is as fine as float32 on these models. Over 50 steps, training magnifies such "
    "differences, in both dtypes."
)
_C3A = (
    "**C3A.** The gradient that PEFT 0.21 passes on to the layers below an adapted one is wrong: its operator "
    "correlates with the kernel where it has to convolve. `tests/parity/test_peft_c3a.py` shows it on one layer, and "
    "that everything agrees if PEFT multiplies by the matrix that it merges. PEFT also computes the products in "
    "float32 on a base in float64."
)
_ADALORA = (
    "**AdaLoRA.** On a base that is not in float32, PEFT 0.21 makes `ranknum`, the divisor of the scale, a parameter "
    "that trains. Without that, tiny models agree to 1e-15 (run by hand, not stored)."
)
_VIRTUAL = (
    "**Virtual tokens.** PEFT keeps their table in float32 on a base in float64, so its values are rounded when they "
    "are loaded, and it trains in float32. With a table in float64, first gradients of SmolLM2 agree to 5e-15 for "
    "prompt tuning and to 2e-14 for prefix tuning, and the losses of prompt tuning to 1.4e-13. Training a prefix "
    "magnifies rounding: its losses then differ by 3.6e-7, where PEFT's own differ by 8.6e-6 if the prefix starts one "
    "rounding away. These figures are from runs by hand, which are not stored. In float32 no other difference was "
    "found; how much of the losses' difference is rounding was not measured there."
)
CAUSES: Mapping[tuple[str, str], str] = {
    **{("C3A", dtype): _C3A for dtype in GATES},
    ("AdaLoRA", "float64"): _ADALORA,
    **{(name, dtype): _VIRTUAL for name in ("Prompt tuning", "Prefix tuning") for dtype in GATES},
}
"""By the name of a row and its dtype; each was checked by removing it."""
NAMES: Mapping[str, str] = {"IA3": "(IA)3", "Prompt tuning": "prompt", "Prefix tuning": "prefix"}
"""How rows are shown that have other names in the tables of training."""
_MAGNIFIED = "MiSS"


def named(row: str) -> str:
    """Return the name of a row as all tables show it."""
    return NAMES.get(row, row)


def magnified(records: Iterable[Record]) -> str:
    """Return how many times the first gradients' difference that of the losses is, for one row; empty without cells."""
    shown = [
        f"{own.figures['losses'] / own.figures['gradients']:,.0f} times in {own.cell.dtype}"
        for own in records
        if (own.cell.name, own.cell.model) == (_MAGNIFIED, "smollm2") and own.cell.dtype in GATES
    ]
    if not shown:
        return ""
    return f"The difference of {_MAGNIFIED}'s losses on SmolLM2 is that of its first gradients {' and '.join(shown)}."


def misses(record: Record) -> tuple[str, ...]:
    """Return the names of the figures that exceed their gates; NaN always does."""
    gates = GATES.get(record.cell.dtype, {})
    return tuple(name for name, gate in gates.items() if not record.figures[name] <= gate)


def causes(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the records that miss a gate by the causes."""
    records = list(records)
    within_gates: dict[tuple[str, str], set[str]] = {}
    for record in records:
        if record.cell.dtype == "float64":
            within_gates[record.cell.model, record.cell.name] = GATES["float64"].keys() - set(misses(record))
    by_cause: dict[str, list[Record]] = {}
    for record in filter(misses, records):
        within = within_gates.get((record.cell.model, record.cell.name), set())
        rounded = record.cell.dtype == "float32" and within.issuperset(misses(record))
        cause = ROUNDED if rounded else CAUSES.get((record.cell.name, record.cell.dtype), UNKNOWN)
        by_cause.setdefault(cause, []).append(record)
    return by_cause
