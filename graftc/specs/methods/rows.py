"""Training some rows of matrices and tables."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.errors.text import listed
from graftc.specs.patterns import parse_slice
from graftc.specs.peft import AS_USUAL, PeftFormat, PeftPart
from graftc.specs.schema import RowNumber, needs_one_of
from graftc.specs.spec_errors import problems_of, refuse, reject


class RowSelection(MethodSpec):
    """Trains some rows of matrices and tables directly: tokens of an embedding table, blocks of rows, or n of every m.

    A row is an output feature of a linear map, an entry of an embedding table (a token), or an output feature of every
    expert, the same ones for all of them. In a part of a fused weight (`attn.q` of GPT-2), rows are counted from the
    first row of that part. The rows are specified in one of three ways: `rows` names them, `n_of_m` takes some of every
    few consecutive ones, `density` takes a share of all blocks. The last two select by the base's values or at random,
    once, for each weight separately, and their selection is saved with the trained tensors: an artifact always has the
    same rows.

    The trained tensors are copies of these rows, used in the base's dtype, that stand in for them, so the base is never
    written, nothing else changes, and the model is initially unchanged bit for bit. Optimisers have state for these
    rows only; a forward pass puts them in place in a copy of the weight. A table that is tied to a head has one copy
    for both. Folding writes the trained rows into the weights. For new tokens, see `tokens:`.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
    )
    paper: ClassVar[str] = (
        "Yang et al. 2024, S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity; "
        "Mishra et al. 2021, Accelerating Sparse Deep Neural Networks"
    )

    one_of: ClassVar[tuple[str, ...]] = ("density", "rows", "n_of_m")

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("TRAINABLE_TOKENS",),
        parts={"weight": PeftPart("trainable_tokens_delta", "rows", nested="token_adapter.trainable_tokens_delta")},
        fields={"token_indices": "rows"},
        starts={"init_weights": AS_USUAL},
        ignored=frozenset({"init_weights"}),
        training=frozenset({"block", "selection"}),
    )

    method: Literal["rows"] = "rows"
    """The method's tag."""

    rows: Items[RowNumber] | None = Field(default=None, json_schema_extra={"minItems": 1})
    """Row numbers and slices, such as `[0, 7, "100:116", "-4:"]`; negative numbers count from the end, and a slice ends
    at the last row at the latest."""

    n_of_m: Items[Annotated[int, Field(ge=1)]] | None = Field(
        default=None, examples=[[2, 4]], json_schema_extra={"minItems": 2, "maxItems": 2}
    )
    """Two numbers, n and m: take n of every m consecutive rows, as in `[2, 4]`. If fewer than m rows are left at the
    end, as many as possible are taken."""

    density: float | None = Field(default=None, gt=0, le=1, examples=[0.1])
    """Share of all blocks of rows, rounded down to whole blocks, but at least one."""

    block: int = Field(default=1, ge=1)
    """Number of consecutive rows in a block of `density`; the last block may have fewer."""

    selection: Literal["magnitude", "random"] = "magnitude"
    """The rows that `n_of_m` and `density` take: those of the base's weight with the largest norms, the earlier ones in
    case of ties (blocks are compared by the mean square of their rows), or random rows, which depend on the compilation
    seed and the name of the adaptation."""

    bias: bool = False
    """Also train the bias entries that belong to the rows, if a map has a bias."""

    @field_validator("rows")
    @classmethod
    def _rows_are_numbers(cls, value: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        if value is not None and not value:
            refuse((), "an empty list names no rows", hint='for example: rows: [0, "8:16"]')
        reject(problems_of(value or (), lambda entry: parse_slice(entry, "row")))
        return value

    @field_validator("n_of_m")
    @classmethod
    def _n_is_some_of_m(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return value
        if len(value) != 2:
            message = f"n_of_m must have 2 numbers, not {len(value)}"
            refuse((), message, hint="n_of_m: [2, 4] trains 2 rows of every 4")
        n, m = value
        if n > m:
            refuse((), f"n_of_m cannot select {n} rows of every {m}", hint=f"did you mean [{m}, {n}]?")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [way for way in self.one_of if getattr(self, way) is not None]
        if not given:
            hint = 'for example density: 0.1, rows: [0, "8:16"] or n_of_m: [2, 4]'
            refuse((), "method rows needs one of density, rows and n_of_m", hint=hint)
        if len(given) > 1:
            refuse(given[1], f"{listed(given)} exclude each other", hint="set only one of them")
        if "block" in self.model_fields_set and self.density is None:
            refuse("block", f"block needs density, but here {given[0]} selects the rows", hint="remove it")
        if "selection" in self.model_fields_set and self.rows is not None:
            refuse("selection", "selection needs n_of_m or density, but here rows names the rows", hint="remove it")
        return self

    @classmethod
    def _conditions(cls) -> list[dict[str, Any]]:
        return [{"oneOf": needs_one_of(cls.one_of)["anyOf"]}]
