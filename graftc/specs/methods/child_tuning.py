"""Child-Tuning: training a different random part of the network in every step (Xu et al. 2021)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.methods.bases.sparse import BudgetSpec, share
from graftc.specs.methods.full import TENSORS
from graftc.specs.target import Target


class ChildTuning(BudgetSpec):
    """Child-Tuning: fine-tunes a child network, a subset of all parameters.

    `F` draws a different random subset in every step. The trained tensors are copies, used in the base's dtype, that
    stand in for the base's tensors, as with `full`. Before the optimiser sees the gradient of an element, it is divided
    by `reserve_p` in steps that keep the element and set to zero in all others, so the mean over steps is the gradient
    itself. Masks are derived from the seed, the tensor's name and the step number: they take no memory, the
    micro-batches of a step share one, and a resumed run continues with the same masks. Call `compiled.after_step()`
    after each optimiser step, or give the Trainer `compiled.callback()`: it counts the steps, and without it every step
    has the same masks (GC025). An element without a gradient still moves if the optimiser has momentum or weight decay,
    as in the authors' code.

    `D` selects one subset permanently: the share `reserve_p` of all entries in layers whose gradients had the largest
    mean square over batches of examples. Call `Compiled.select` before training. These entries train as differences to
    the base, so no optimiser can move any other entry of the layers, as weight decay does in the authors' code.
    Parameters outside the layers train as with `full`.
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
    """The sites of the model to adapt; by default all."""

    variant: Literal["F", "D"] = "F"
    """How the child network is chosen: `F` at random in every step, `D` once, based on examples."""

    reserve_p: float = Field(default=0.3, gt=0, le=1)
    """Probability that a step keeps the gradient of an element; with `D`, the share of the layers' entries that
    train."""

    clip: float | None = Field(default=1.0, gt=0)
    """Maximum norm of a tensor's gradient when selecting by examples; `null` for no limit."""

    def budget(self, total: int) -> int:
        """Return the share `reserve_p` of the entries."""
        return share(self.reserve_p, total)

    @property
    def budget_field(self) -> str:
        """The field that sets the budget, `reserve_p`."""
        return "reserve_p"
