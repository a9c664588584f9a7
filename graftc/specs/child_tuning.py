"""Child-Tuning: every step trains another random part of the network (Xu et al. 2021)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.full import TENSORS
from graftc.specs.selection import BudgetSpec, share
from graftc.specs.target import Target

__all__ = ["ChildTuning"]


class ChildTuning(BudgetSpec):
    """Child-Tuning: fine-tuning of a child network, a part of all parameters.

    `F` takes another part at random in every step. What trains are copies in the base's dtype that stand in for the
    base's tensors, as with `full`. Before an optimiser sees the gradient of an element, it is divided by `reserve_p` in
    steps that keep the element, and zero in the others, so that the mean over steps is the gradient itself. Masks
    follow from the seed, the tensor's name and the number of the step: they take no memory, the micro-batches of a step
    share one, and a resumed training goes on with those that it would have had. Call `compiled.after_step()` after each
    optimiser step, or give the Trainer `compiled.callback()`: it counts the steps, and without it every step has the
    same masks (GC025). An element without a gradient still moves where an optimiser has momentum or weight decay, as in
    the authors' code.

    `D` takes one part for good, the share `reserve_p` of all layers' entries whose gradients had the largest mean
    square over batches of examples: call `Compiled.select` before training. They train as differences to the base, so
    that no optimiser can move another entry of the layers, which weight decay does in the authors' code. What is in no
    layer trains as with `full`.
    """

    claims: ClassVar[Claims] = Claims(
        sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT, inert=frozenset({"bias_delta"})
    )
    paper: ClassVar[str] = (
        "Xu et al. 2021, Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning "
        "(arXiv:2109.05687)"
    )

    method: Literal["child_tuning"] = "child_tuning"
    """The method's tag."""

    target: Target = Target(modules="**")
    """Which places of the model it is for; by default all."""

    variant: Literal["F", "D"] = "F"
    """How the child network is chosen: `F` at random in every step, `D` once, by what examples say."""

    reserve_p: float = Field(default=0.3, gt=0, le=1)
    """Probability that a step keeps the gradient of an element; the share of the layers' entries that train, in `D`."""

    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm that a tensor's gradient has where examples choose; `null` for no limit."""

    def budget(self, total: int) -> int:
        """See `BudgetSpec.budget`."""
        return share(self.reserve_p, total)

    @property
    def budget_field(self) -> str:
        """See `BudgetSpec.budget_field`."""
        return "reserve_p"
