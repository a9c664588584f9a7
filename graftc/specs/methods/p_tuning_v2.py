"""P-tuning v2: a prefix for every attention, for understanding text rather than continuing it."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.limits import SIZE
from graftc.specs.methods.prefix import PrefixSpec


class PTuningV2(PrefixSpec):
    """P-tuning v2: trained keys and values in front of those of every attention, together with a trained task head.

    It is `prefix` with the authors' defaults: the text begins after the prefix, which is trained directly and has a
    tenth of its entries dropped. The pooled token is the first token of the text. Name the head in `train:`.
    """

    mechanism: ClassVar[str | None] = "prefix"
    paper: ClassVar[str] = (
        "Liu et al. 2022, P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Across Scales and Tasks"
    )

    method: Literal["p_tuning_v2"] = "p_tuning_v2"
    """The method's tag."""

    length: int = Field(default=20, ge=1, le=SIZE)
    """Number of positions in the prefix; the authors use 4 to 128, depending on the task."""

    positions: Literal["unshifted", "shifted"] = "shifted"
    """`shifted`: the text begins after the prefix, and learned positions must suffice for both; the patches of an image
    stay at their places. `unshifted`: the text keeps its positions."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping an entry of the prefix during training."""
