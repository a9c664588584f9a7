"""Training of some rows of matrices and tables."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.diagnostics import GraftError
from graftc.specs.patterns import parse_slice
from graftc.specs.schema import RowNumber, needs_one_of
from graftc.specs.validation import reject

__all__ = ["RowSelection"]


class RowSelection(MethodSpec):
    """Training of some rows of matrices and tables as they are: tokens of a table, blocks of rows, or n of every m.

    A row is an output feature of a linear map, an entry of a table of embeddings (a token), or an output feature of
    every expert, the same ones for all of them. Of a part of a fused weight (`attn.q` of GPT-2) rows are counted from
    the part's own first. Which rows is said in one of three ways: `rows` names them, `n_of_m` takes some of every few
    consecutive ones, `density` a part of all blocks. The last two go by the base's values or draw, once, for each
    weight by itself, and what they chose is kept with the trained tensors: an artifact has the same rows for good.

    What trains are copies of these rows in the base's dtype that stand in for them, so the base is never written,
    nothing else changes, and the model is unchanged to the bit at first. Optimisers have state for these rows alone; a
    forward pass puts them in place in a copy of the weight. A table that is tied to a head has one copy for both.
    Folding writes the trained rows into the weights. New tokens are another thing: see `tokens:`.
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

    method: Literal["rows"] = "rows"
    """The method's tag."""

    rows: Items[RowNumber] | None = Field(default=None, json_schema_extra={"minItems": 1})
    """Numbers of rows and slices of them, as `[0, 7, "100:116", "-4:"]`; negative ones count from the end, and a slice
    ends where the rows do."""

    n_of_m: Items[Annotated[int, Field(ge=1)]] | None = Field(
        default=None, examples=[[2, 4]], json_schema_extra={"minItems": 2, "maxItems": 2}
    )
    """Two numbers: how many rows of every how many consecutive ones, as `[2, 4]`. The last ones, where fewer are left,
    give as many as they can."""

    density: float | None = Field(default=None, gt=0, le=1, examples=[0.1])
    """Which part of all blocks of rows, rounded down to whole blocks; one at least."""

    block: int = Field(default=1, ge=1)
    """How many consecutive rows a block of `density` has; the last one may have fewer."""

    selection: Literal["magnitude", "random"] = "magnitude"
    """Which rows `n_of_m` and `density` take: those of the base's weight with the greatest norms, the earlier of equal
    ones (blocks go by the mean of squares of their rows), or random ones, which depend on the seed of the compilation
    and the name of the adaptation."""

    bias: bool = False
    """Train the entries of the bias that belong to the rows as well, where a map has one."""

    @field_validator("rows")
    @classmethod
    def _rows_are_numbers(cls, value: tuple[int | str, ...] | None) -> tuple[int | str, ...] | None:
        if value is not None and not value:
            reject([], ((), GraftError("GC002", "an empty list names no row", hint='for example: rows: [0, "8:16"]')))
        problems: list[tuple[tuple[int], GraftError]] = []
        for index, entry in enumerate(value or ()):
            try:
                parse_slice(entry, "row")
            except GraftError as error:
                problems.append(((index,), error))
        if problems:
            reject(value, *problems)
        return value

    @field_validator("n_of_m")
    @classmethod
    def _n_is_some_of_m(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is None:
            return value
        if len(value) != 2:
            message = f"n_of_m has {len(value)} numbers, it must have 2"
            reject(list(value), ((), GraftError("GC002", message, hint="n_of_m: [2, 4] trains 2 rows of every 4")))
        n, m = value
        if n > m:
            message = f"{n} rows of every {m} are more than there are"
            hint = f"did you mean [{m}, {n}]?"
            reject(list(value), ((), GraftError("GC002", message, hint=hint)))
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        given = [way for way in self.one_of if getattr(self, way) is not None]
        if not given:
            message = "rows needs one of density, rows and n_of_m to say which rows train"
            hint = 'for example density: 0.1, rows: [0, "8:16"] or n_of_m: [2, 4]'
            reject(self, ((), GraftError("GC002", message, hint=hint)))
        if len(given) > 1:
            message = f"{', '.join(given[:-1])} and {given[-1]} each say which rows train"
            reject(self, ((given[1],), GraftError("GC002", message, hint="leave all but one of them out")))
        if "block" in self.model_fields_set and self.density is None:
            message = f"block is for density, and here {given[0]} says which rows train"
            reject(self, (("block",), GraftError("GC002", message, hint="leave it out")))
        if "selection" in self.model_fields_set and self.rows is not None:
            message = "selection is for n_of_m and density, and here rows names them"
            reject(self, (("selection",), GraftError("GC002", message, hint="leave it out")))
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        written = super().__get_pydantic_json_schema__(schema, handler)
        parts: list[Any] = handler.resolve_ref_schema(written).setdefault("allOf", [])
        parts.append({"oneOf": needs_one_of(cls.one_of)["anyOf"]})
        return written
