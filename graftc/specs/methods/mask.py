"""Sparse fine-tuning with a fixed selection of entries."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.claims import Claims, FoldKind
from graftc.specs.methods.bases.sparse import SelectionSpec
from graftc.specs.methods.full import TENSORS


class Mask(SelectionSpec):
    """Sparse fine-tuning: trains some entries of the base's tensors, selected once; the others stay as they are.

    The trained parameters are the differences from the base at these entries, and the optimiser sees nothing else:
    weight decay pulls them towards the base, and no other entry can move. The differences and the indices of their
    entries are saved.

    `random` and `magnitude` select when the model is compiled. `fish` and `movement` use examples: the entries are
    random until `Compiled.select` has selected them. `fish` takes the entries whose gradient has the largest mean
    square over single examples (the diagonal of the empirical Fisher information), `movement` those that a step of
    gradient descent would move away from zero most. Exactly as many are selected as the budget requires, the first ones
    in case of ties.
    """

    claims: ClassVar[Claims] = Claims(
        sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT, inert=frozenset({"bias_delta"})
    )
    paper: ClassVar[str] = "Sung et al. 2021, Training Neural Networks with Fixed Sparse Masks"
    usual_density: ClassVar[float] = 0.005

    method: Literal["mask"] = "mask"
    """The method's tag."""

    selection: Literal["random", "magnitude", "movement", "fish"] = "fish"
    """How the entries are selected."""

    allocation: Literal["global", "per_tensor"] = "global"
    """Whether tensors compete for entries, or each gets a number in proportion to its size; random selection always
    does the latter."""
