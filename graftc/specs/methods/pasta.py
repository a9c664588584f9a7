"""PASTA: trained vectors added to the input of every layer at the special tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.spec_errors import first_repeat, refuse
from graftc.specs.target import Target


class Pasta(MethodSpec):
    """PASTA: a trained vector for each special token, added to the input of every layer.

    Before every layer, `x_t` is replaced by `x_t + e_j` if token `t` is the `j`-th special one of its row; all other
    positions stay unchanged.

    Queries, keys, values and the residual all read the sum. Special tokens are found by their ids, row by row, so one
    batch may mix rows with one text and rows with two. Special tokens beyond the last slot share its vector: with two
    slots and `[CLS] a [SEP] b [SEP]`, both separators get the second. In an encoder-decoder model each layer uses the
    ids of its own stack.

    With `init: zeros` the model initially equals the base; with the authors' initialisation it does not.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.VALUE}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )
    paper: ClassVar[str] = "Yang et al. 2023, Parameter-Efficient Tuning with Special Token Adaptation"

    method: Literal["pasta"] = "pasta"
    """The method's tag."""

    target: Target = Target(role="layer.in")
    """The sites of the model to adapt; by default the input of every layer."""

    special_tokens: Items[Annotated[int, Field(ge=0)]] = Field(
        examples=[[101, 102]], json_schema_extra={"minItems": 1, "uniqueItems": True}
    )
    """The ids of the special tokens, such as `[101, 102]` for BERT's `[CLS]` and `[SEP]`."""

    slots: int = Field(default=2, ge=1, le=SIZE)
    """Number of vectors per layer: 2 for single texts, 3 for pairs (`[CLS] a [SEP] b [SEP]`), 4 if a pair has two
    separators in the middle, as with RoBERTa."""

    shared: bool = False
    """One vector for all slots of a layer: the paper's ablation."""

    init: Literal["normal", "zeros"] = "normal"
    """How the vectors are initialised: `normal`, as in the authors' code, or `zeros`, so that the model is initially
    unchanged."""

    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of `normal`."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping an entry of the added vectors during training."""

    @field_validator("special_tokens")
    @classmethod
    def _tokens_are_told_apart(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            refuse((), "PASTA needs the ids of the special tokens", hint="for BERT: special_tokens: [101, 102]")
        if (index := first_repeat(value)) is not None:
            refuse(index, f"{value[index]} is listed twice")
        return value

    @property
    def vectors(self) -> int:
        """The number of trained vectors per layer."""
        return 1 if self.shared else self.slots
