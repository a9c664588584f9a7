"""P-tuning v2 (Liu et al. 2022, arXiv:2110.07602)."""

from __future__ import annotations

from graftc.passes.prefix import PrefixedAttention
from graftc.specs.p_tuning_v2 import PTuningV2


class PTuningV2Method(PrefixedAttention[PTuningV2]):
    """`PrefixedAttention` with the defaults of its spec."""

    spec_class = PTuningV2
