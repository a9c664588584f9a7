"""Diff pruning: a difference to the base's tensors with gates, of which few entries are left in the end."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, Strict

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.full import TENSORS
from graftc.specs.selection import StagedSpec

__all__ = ["DiffPruning"]

Stretch = Annotated[tuple[Annotated[float, Field(lt=0)], Annotated[float, Field(gt=1)]], Strict(False)]
"""Two numbers around 0 and 1; a list in a document."""


class DiffPruning(StagedSpec):
    """Diff pruning: a sparse difference to the base's tensors, `W' = W + z z_group w`, found by gates under a penalty.

    It takes two trainings. In the first one each entry of the target has a difference `w`, zero at first, and a gate
    `z = clip(sigmoid(log(u / (1 - u)) + alpha) (high - low) + low, 0, 1)`, with `u` uniform between 0.0001 and 0.9999,
    drawn anew in every forward pass, and `low` and `high` those of `stretch`. Each tensor has one more gate. All are
    float32 (float64 for a base of float64): `<tensor>_w` and `<tensor>_alpha` of the tensor's shape, and
    `<tensor>_group` with one element. A layer that is computed again has the same noise, and the backward pass keeps a
    seed instead of the gates. In eval mode, and when merging, gates are those without noise, `u = 1/2`; the authors
    evaluate with drawn ones.

    A training loop adds `compiled.extra_loss()`, which is `penalty` times how many gates are open on average, where
    `P(z > 0)` is `sigmoid(alpha - log(-low / high))`. Gates of tensors add theirs, as in the authors' code; in the
    paper's penalty they multiply those of their entries, see `group_penalty`.

    The second training starts from as many of the largest `|z z_group w|` of all tensors together as the budget says,
    of equal ones the first. These entries train as in `mask`, and all others are the base's to the bit. Without values
    from a first one it starts from random entries.

    The authors train two groups of parameters in the first training, `w` with a learning rate of 1e-5 to 5e-5 and
    gates (names that end in `_alpha` or `_group`) with 0.1, both by AdamW, with gradients clipped to a norm of 1. With
    `w`, `alpha` and `W'` beside `W` it takes about four times the model's memory, before gradients and the optimiser's
    state, which are those of two models. A head that gives the outputs is passed over: name it in `train:`.
    """

    claims: ClassVar[Claims] = Claims(
        sites=TENSORS,
        identity_at_init=True,
        folds=FoldKind.EXACT,
        # Gates have a gradient where they are not clipped, once there is a difference.
        inert=frozenset({"bias_w", "bias_delta", "*_alpha", "*_group"}),
    )
    paper: ClassVar[str] = "Guo et al. 2021, Parameter-Efficient Transfer Learning with Diff Pruning (arXiv:2012.07463)"
    usual_density: ClassVar[float] = 0.005

    method: Literal["diff_pruning"] = "diff_pruning"
    """The method's tag."""

    density: float | None = Field(default=None, gt=0, le=1)
    """Share of the target's entries that are left for the second training, rounded down; 0.005 by default."""

    entries: int | None = Field(default=None, ge=1)
    """How many entries are left, instead of a share."""

    stage: int = Field(default=1, ge=1, le=2)
    """Which of its two trainings this is: gates, or the entries that are left; recipes count it."""

    structured: bool = True
    """Whether each tensor has a gate too, beside those of its entries."""

    penalty: float = Field(default=1.25e-7, ge=0)
    """Weight of the number of open gates; 0 leaves the term out."""

    group_penalty: Literal["sum", "product"] = "sum"
    """How gates of tensors count in the penalty: beside those of their entries, as in the authors' code, or times them,
    as in the paper."""

    stretch: Stretch = (-1.5, 1.5)
    """What gates are stretched to before they are clipped to 0 and 1."""

    initial_alpha: float = 5.0
    """What `alpha` starts at, of entries and of tensors: gates are all but open."""

    @property
    def shift(self) -> float:
        """What is taken off `alpha` for the logit of `P(z > 0)`: `log(-low / high)`."""
        low, high = self.stretch
        return math.log(-low / high)
