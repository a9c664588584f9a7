"""Diff pruning: a gated difference from the base's tensors, of which few entries remain in the end."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.methods.bases.sparse import StagedSpec
from graftc.specs.methods.full import TENSORS

Stretch = Annotated[tuple[Annotated[float, Field(lt=0)], Annotated[float, Field(gt=1)]], Strict(False)]
"""Two numbers, below 0 and above 1; a list in a document."""


class DiffPruning(StagedSpec):
    """Diff pruning: a sparse difference to the base's tensors, `W' = W + z z_group w`, found by penalised gates.

    It takes two training runs. In the first, each entry of the target has a difference `w`, initialised to zero, and a
    gate `z = clip(sigmoid(log(u / (1 - u)) + alpha) (high - low) + low, 0, 1)`, where `u` is uniform between 0.0001 and
    0.9999, drawn again in every forward pass, and `low` and `high` are the values of `stretch`. Each tensor has one
    additional gate. All are float32 (float64 for a float64 base): `<tensor>_w` and `<tensor>_alpha` have the tensor's
    shape, and `<tensor>_group` has one element. A recomputed layer has the same noise, and the backward pass keeps a
    seed instead of the gates. Eval mode and merging use the gates without noise, `u = 1/2`; the authors evaluate with
    drawn gates.

    A training loop adds `compiled.extra_loss()`, which is `penalty` times the expected number of open gates, where `P(z
    > 0)` is `sigmoid(alpha - log(-low / high))`. The gates of tensors are added to this number, as in the authors'
    code; in the paper's penalty they multiply the gates of their entries, see `group_penalty`.

    The second training run starts from the largest `|z z_group w|` across all tensors, as many as the budget allows,
    the first ones in case of ties. These entries train as in `mask`, and all others equal the base's bit for bit.
    Without values from a first run, it starts from random entries.

    In the first run the authors train two parameter groups, `w` with a learning rate of 1e-5 to 5e-5 and the gates
    (names that end in `_alpha` or `_group`) with 0.1, both with AdamW and gradients clipped to a norm of 1. With `w`,
    `alpha` and `W'` in addition to `W`, it takes about four times the model's memory, before gradients and optimiser
    state, which are those of two models. A head that produces the outputs is skipped: name it in `train:`.
    """

    claims: ClassVar[Claims] = Claims(
        sites=TENSORS,
        identity_at_init=True,
        folds=FoldKind.EXACT,
        # Gates get a gradient only while they are not clipped and the difference is not zero.
        inert=frozenset({"bias_w", "bias_delta", "*_alpha", "*_group"}),
        undecayed=frozenset({"*_alpha", "*_group"}),
    )
    paper: ClassVar[str] = "Guo et al. 2021, Parameter-Efficient Transfer Learning with Diff Pruning (arXiv:2012.07463)"
    usual_density: ClassVar[float] = 0.005

    method: Literal["diff_pruning"] = "diff_pruning"
    """The method's tag."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Share of the target's entries that are left for the second training run, rounded down; 0.005 by default."""

    entries: int | None = Field(default=None, ge=1)
    """Number of entries that are left, instead of a share."""

    stage: int = Field(default=1, ge=1, le=2)
    """The number of this training run: 1 for the gates, 2 for the remaining entries; recipes count it."""

    structured: bool = True
    """Whether each tensor has a gate too, in addition to those of its entries."""

    penalty: float = Field(default=1.25e-7, ge=0)
    """Weight of the number of open gates; 0 omits the term."""

    group_penalty: Literal["sum", "product"] = "sum"
    """How the gates of tensors enter the penalty: added to those of their entries, as in the authors' code, or
    multiplied with them, as in the paper."""

    stretch: Stretch = (-1.5, 1.5)
    """The interval to which gates are stretched before they are clipped to 0 and 1."""

    initial_alpha: float = 5.0
    """Initial value of `alpha`, for entries and for tensors: gates start almost fully open."""

    @property
    def shift(self) -> float:
        """The value to subtract from `alpha` for the logit of `P(z > 0)`: `log(-low / high)`."""
        low, high = self.stretch
        return math.log(-low / high)
