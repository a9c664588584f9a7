"""LT-SFT: lottery-ticket sparse fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.full import TENSORS
from graftc.specs.selection import StagedSpec

__all__ = ["LTSFT"]


class LTSFT(StagedSpec):
    """LT-SFT: everything trains, what has changed most is chosen, all goes back, and the chosen entries train alone.

    Two trainings for each iteration: a dense one, which needs the memory of full fine-tuning, and a sparse one, which
    starts from where the dense one started. `Compiled.advance` goes from one to the next, and `graftc.tune` runs all.
    Every iteration adds its share of the budget to what was chosen before, and starts from what the one before has
    trained. What `train:` names, a head, trains in full in both, and goes back too.

    The result adds to a base, so that fine-tunes of a task and of a language can be put on one another:
    `Compiled.joined`. Of equal changes the first are chosen, so that there are exactly as many entries as the budget
    says; the authors' code takes all of them, and drops changes below 1e-7 when it keeps the result.
    """

    claims: ClassVar[Claims] = Claims(
        sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT, inert=frozenset({"bias", "bias_delta"})
    )
    paper: ClassVar[str] = "Ansell et al. 2022, Composable Sparse Fine-Tuning for Cross-Lingual Transfer"
    usual_density: ClassVar[float] = 0.01

    method: Literal["lt_sft"] = "lt_sft"
    """The method's tag."""

    iterations: int = Field(default=1, ge=1)
    """In how many turns the entries are chosen."""

    penalty: float = Field(default=0.0, ge=0)
    """Weight of the mean distance of an entry from the base, a term beside the loss."""

    @property
    def dense(self) -> bool:
        """Whether this training is a dense one."""
        return self.stage % 2 == 1

    @property
    def iteration(self) -> int:
        """Which iteration this training belongs to, from 1."""
        return (self.stage + 1) // 2
