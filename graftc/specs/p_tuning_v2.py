"""P-tuning v2: a prefix of every attention, for understanding a text rather than for continuing it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.limits import SIZE
from graftc.specs.prefix import PrefixSpec

__all__ = ["PTuningV2"]


class PTuningV2(PrefixSpec):
    """P-tuning v2: trained keys and values in front of those of every attention, beside a task head that trains.

    It is `prefix` with the authors' defaults: the text begins after the prefix, which is trained as it is and drops a
    tenth of its entries. What is pooled is the first token of the text. Name the head in `train:`.
    """

    paper: ClassVar[str] = (
        "Liu et al. 2022, P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Across Scales and Tasks"
    )

    method: Literal["p_tuning_v2"] = "p_tuning_v2"
    """The method's tag."""

    length: int = Field(default=20, ge=1, le=SIZE)
    """How many positions the prefix has; the authors take 4 to 128, by task."""

    positions: Literal["unshifted", "shifted"] = "shifted"
    """`shifted`: the text begins after the prefix, and learned positions have to suffice for both. `unshifted`: it
    keeps its positions."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping an entry of the prefix during training."""
