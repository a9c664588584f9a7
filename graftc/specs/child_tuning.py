"""Child-Tuning: every step trains another random part of the network (Xu et al. 2021)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind
from graftc.specs.full import TENSORS
from graftc.specs.target import Target

__all__ = ["ChildTuning"]


class ChildTuning(MethodSpec):
    """Child-Tuning: fine-tuning in which every step trains a child network, a random part of all parameters.

    What trains are copies in the base's dtype that stand in for the base's tensors, as with `full`. Before an optimiser
    sees the gradient of an element, it is divided by `reserve_p` in steps that keep the element, and zero in the
    others, so that the mean over steps is the gradient itself. Masks follow from the seed, the tensor's name and the
    number of the step: they take no memory, the micro-batches of a step share one, and a resumed training goes on with
    those that it would have had. Call `compiled.after_step()` after each optimiser step, or give the Trainer
    `compiled.callback()`: it counts the steps, and without it every step has the same masks (GC025).

    An element without a gradient still moves where an optimiser has momentum or weight decay, as in the authors' code.
    """

    claims: ClassVar[Claims] = Claims(sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = (
        "Xu et al. 2021, Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning "
        "(arXiv:2109.05687)"
    )

    method: Literal["child_tuning"] = "child_tuning"
    """The method's tag."""

    target: Target = Target(modules="**")
    """Which places of the model it is for; by default all."""

    variant: Literal["F"] = "F"
    """How the child network is chosen. `F`: anew in every step, at random, without regard to the task."""

    reserve_p: float = Field(default=0.3, gt=0, le=1)
    """Probability that a step keeps the gradient of an element. 1 keeps all: `full`."""
