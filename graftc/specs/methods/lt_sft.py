"""LT-SFT: lottery-ticket sparse fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.methods.bases.sparse import StagedSpec
from graftc.specs.methods.full import TENSORS


class LTSFT(StagedSpec):
    """LT-SFT: everything trains, the most changed entries are selected, all is reset, and these entries train alone.

    Each iteration takes two training runs: a dense one, which needs the memory of full fine-tuning, and a sparse one,
    which starts from the same point as the dense one. `Compiled.advance` moves from one to the next, and `graftc.tune`
    runs all of them. Every iteration adds its share of the budget to the entries selected before, and starts from the
    values that the previous iteration trained. Modules named in `train:`, such as a head, train in full in both runs,
    and are reset too.

    The result adds to a base, so fine-tunes of a task and of a language can be combined: `Compiled.joined`. In case of
    equal changes the first entries are selected, so there are exactly as many entries as the budget requires; the
    authors' code takes all of them, and drops changes below 1e-7 when it saves the result.
    """

    claims: ClassVar[Claims] = Claims(
        sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT, inert=frozenset({"bias", "bias_delta"})
    )
    paper: ClassVar[str] = "Ansell et al. 2022, Composable Sparse Fine-Tuning for Cross-Lingual Transfer"
    usual_density: ClassVar[float] = 0.01

    method: Literal["lt_sft"] = "lt_sft"
    """The method's tag."""

    iterations: int = Field(default=1, ge=1)
    """Number of rounds in which the entries are selected."""

    penalty: float = Field(default=0.0, ge=0)
    """Weight of the mean distance of an entry from the base, a term added to the loss."""

    @property
    def dense(self) -> bool:
        """Whether this training run is a dense one."""
        return self.stage % 2 == 1

    @property
    def iteration(self) -> int:
        """The iteration that this training run belongs to, counted from 1."""
        return (self.stage + 1) // 2
