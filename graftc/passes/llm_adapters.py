"""LLM-Adapters: bottlenecks at single linear maps (Hu et al. 2023, arXiv:2304.01933)."""

from __future__ import annotations

from graftc.passes.bottleneck import BottleneckAdapter
from graftc.specs.llm_adapters import LLMAdapters


class LLMAdaptersMethod(BottleneckAdapter[LLMAdapters]):
    """``W (x + s A(x))``, ``W x + s A(W x)`` or ``W x + s A(x)`` on a linear map."""

    spec_class = LLMAdapters
