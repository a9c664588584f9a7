"""Fine-tuning of cross-attention (Gheini et al. 2021, arXiv:2104.08771)."""

from __future__ import annotations

from graftc.passes.full import TrainedTensors
from graftc.specs.cross_attention import CrossAttention


class CrossAttentionMethod(TrainedTensors[CrossAttention]):
    """`TrainedTensors` of cross-attentions."""

    spec_class = CrossAttention
