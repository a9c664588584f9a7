"""Fine-tuning of the last layers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.full import TENSORS
from graftc.specs.target import Target, written_fields


class LastLayers(MethodSpec):
    """Fine-tuning of the last `count` layers: trains all of their parameters; the others stay unchanged.

    In an encoder-decoder model these are the last layers of each stack; use the `layers` of a target to change this.
    The backward pass ends at the first layer that trains. The trained tensors are copies, as with `full`; to train the
    norm after the layers too, add `norms`.
    """

    claims: ClassVar[Claims] = Claims(sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = "Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation"

    method: Literal["last_layers"] = "last_layers"
    """The method's tag."""

    target: Target = Target(modules="**", layers="-2:")
    """The sites of the model to adapt; by default all of the last `count` layers."""

    count: int = Field(default=2, ge=1, le=SIZE)
    """How many layers of each stack train."""

    @model_validator(mode="before")
    @classmethod
    def _layers_by_count(cls, data: Any) -> Any:
        """Select the last `count` layers unless the target sets layers."""
        if not isinstance(data, Mapping):
            return data
        fields, count = written_fields(data.get("target", {})), data.get("count", 2)
        if not isinstance(fields, Mapping) or not isinstance(count, int) or isinstance(count, bool) or count < 1:
            return data
        return {**data, "target": {"layers": f"-{count}:", **fields}}
