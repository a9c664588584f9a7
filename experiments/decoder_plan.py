"""The cells of the decoder: SmolLM2 learns to say records in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.cells import Cell, Part
from experiments.training_plans import FACTORS, LAYERS, VECTORS, Row, Rows, plan_of

SEEDS = range(3)
STEPS, BATCH, RECORDS, TESTED, NEW_TOKENS = 80, 4, 400, 40, 64
RANKS = (1, 4, 16, 64)
_LINEAR: Mapping[str, Any] = {"target": {"role": [*LAYERS, "ffn.gate"]}}
FULL_RATE = 3e-5

PLAIN = "as it is"
_LISTED: Sequence[Row] = (
    Row(PLAIN, None, head=()),
    Row("full", {"method": "full", **_LINEAR}, FULL_RATE, head=()),
    *(
        Row(f"LoRA, rank {rank}", {"method": "lora", **_LINEAR, "rank": rank, "alpha": 16}, 3e-4, head=())
        for rank in RANKS
    ),
    Row("prefix", {"method": "prefix", "length": 16}, VECTORS, head=()),
    Row("prompt", {"method": "prompt", "length": 16, "init": "vocabulary"}, VECTORS, head=()),
    Row("Pfeiffer", {"method": "pfeiffer"}, FACTORS, head=()),
    Row("SpIEL", {"method": "spiel", **_LINEAR, "equivalent_rank": 16}, 3e-4, "aged", head=()),
)
"""LoRA's alpha is the same at every rank."""
ROWS: Rows = {row: row.fields is not None for row in _LISTED}
"""All are trained with every seed, except the model as it is, which does not depend on one."""


@dataclass(frozen=True)
class DecoderSetting:
    """The settings that all cells of the decoder share.

    Attributes:
        quick: whether cells are tiny.
        part: the name of the part.
    """

    quick: bool = False
    part: str = "decoder"

    @property
    def seeds(self) -> Sequence[int]:
        """The seeds of every row."""
        return SEEDS[:2] if self.quick else SEEDS

    def cell(self, row: Row, rate: float, seed: int) -> Cell:
        """Return a cell of a row."""
        settings = {
            "spec": row.spec,
            "records": 40 if self.quick else RECORDS,
            "test": 6 if self.quick else TESTED,
            "batch": BATCH,
            "new_tokens": 8 if self.quick else NEW_TOKENS,
            "optimiser": row.optimiser,
        }
        model, steps = ("tiny-llama", 3) if self.quick else ("smollm2", STEPS)
        return Cell(self.part, row.name, row.method, model, "float32", rate, seed, steps, settings)


def decoder(quick: bool = False) -> Part:
    """Return the part that trains a decoder."""
    rows = dict([*ROWS.items()][:3]) if quick else ROWS
    plan = plan_of(lambda: [(DecoderSetting(quick), rows)])
    return Part("decoder", "experiments.generating:figures", "experiments.parity_plan:model_files", plan)
