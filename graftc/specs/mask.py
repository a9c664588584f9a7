"""Sparse fine-tuning with a fixed selection of entries."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.full import TENSORS
from graftc.specs.selection import SelectionSpec

__all__ = ["Mask"]


class Mask(SelectionSpec):
    """Sparse fine-tuning: some entries of the base's tensors train, chosen once, and the others stay to the bit.

    What trains is the difference to the base at these entries, and an optimiser sees nothing else: weight decay pulls
    it towards the base, and no other entry can move. Kept are the differences and the numbers of their entries.

    `random` and `magnitude` choose when the model is compiled. `fish` and `movement` look at examples: the entries are
    random until `Compiled.select` has chosen them. `fish` takes those whose gradient has the largest mean square over
    single examples (the diagonal of the empirical Fisher information), `movement` those that a step of descent would
    move away from zero most. Exactly as many are chosen as the budget says, of equal ones the first.
    """

    claims: ClassVar[Claims] = Claims(
        sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT, inert=frozenset({"bias_delta"})
    )
    paper: ClassVar[str] = "Sung et al. 2021, Training Neural Networks with Fixed Sparse Masks"
    usual_density: ClassVar[float] = 0.005

    method: Literal["mask"] = "mask"
    """The method's tag."""

    selection: Literal["random", "magnitude", "movement", "fish"] = "fish"
    """What chooses the entries."""

    allocation: Literal["global", "per_tensor"] = "global"
    """Whether tensors compete for entries, or each has as many as its size says; at random it is always the latter."""
