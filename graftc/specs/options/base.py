"""Options of a spec for how the base's weights are stored."""

from __future__ import annotations

from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from graftc.specs.base import SpecModel
from graftc.specs.spec_errors import refuse
from graftc.specs.target import PatternList

QuantizationName: TypeAlias = Literal["int8", "int4", "nf4", "fp4"]
"""A format that a base's weights can be quantised to, as described in `BaseOptions.quantize`."""

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The group sizes that `nf4` and `fp4` support, as in bitsandbytes."""


class BaseOptions(SpecModel):
    """How the base's weights are stored. Those of the linear maps and experts in the repeated layers are quantised;
    biases, norms, embeddings, routers and heads are not.
    """

    quantize: QuantizationName | None = None
    """The format. `nf4`, `fp4`: the codes of bitsandbytes (QLoRA, arXiv:2305.14314). `int8`, `int4`: whole numbers with
    a scale, as torchao has them. The values of the base become those of the quantised weights."""

    group: int | None = Field(default=None, ge=1, le=2**16)
    """How many values share a scale. Default: 64; for `int8` a whole row. `nf4` and `fp4` have groups of 32, 64 and so
    on to 4096, powers of two."""

    double: bool = False
    """`nf4` and `fp4`: the scales are quantised too, to 8 bits."""

    skip: PatternList = ()
    """Globs of modules that stay as they are, with all that is in them."""

    @classmethod
    def _conditions(cls) -> list[dict[str, Any]]:
        """Return the conditions of `_fits`, all of which a schema can express."""
        unset = {"anyOf": [{"type": "null"}, {"type": "array", "maxItems": 0}]}
        blocks = {"properties": {"quantize": {"enum": ["nf4", "fp4"]}}, "required": ["quantize"]}
        return [
            {
                "if": {"properties": {"quantize": {"type": "string"}}, "required": ["quantize"]},
                "else": {"properties": {"group": {"type": "null"}, "double": {"const": False}, "skip": unset}},
            },
            {
                "if": blocks,
                "then": {"properties": {"group": {"enum": [None, *BLOCKS]}}},
                "else": {"properties": {"double": {"const": False}}},
            },
        ]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        blocks = self.quantize in ("nf4", "fp4")
        if self.quantize is None:
            given = next((name for name in ("group", "double", "skip") if getattr(self, name)), None)
            if given is not None:
                refuse(given, f"{given} has no effect without quantize", hint="add quantize: nf4, or remove it")
        elif self.double and not blocks:
            message = f"the scales of {self.quantize} are not quantised"
            refuse("double", message, hint="remove double, or use quantize: nf4")
        elif blocks and self.group is not None and self.group not in BLOCKS:
            nearest = min(BLOCKS, key=lambda size: abs(size - (self.group or 0)))
            hint = f"use {nearest}; supported groups are {', '.join(map(str, BLOCKS))}"
            refuse("group", f"{self.quantize} does not support groups of {self.group}", hint=hint)
        return self
