"""Everything that a method is written with: the one module that plugins import, beside `graftc.testing`.

Names are looked up when they are asked for, so a module of specs that imports from here loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_SPEC = {
    "Claims": "graftc.specs.claims",
    "FoldKind": "graftc.specs.claims",
    "GraftError": "graftc.specs.diagnostics",
    "Items": "graftc.specs.base_model",
    "MethodSpec": "graftc.specs.base",
    "Override": "graftc.specs.overrides",
    "SiteKind": "graftc.specs.claims",
    "Target": "graftc.specs.target",
    "VirtualRun": "graftc.specs.virtual",
}
"""What a module of specs needs."""

_METHOD = {
    "Advance": "graftc.passes.core.stages",
    "AttentionSite": "graftc.passes.core.sites",
    "BaseGradients": "graftc.passes.core.windows",
    "Builder": "graftc.passes.core.builder",
    "Controller": "graftc.passes.core.steering",
    "Fold": "graftc.passes.core.folds",
    "Keep": "graftc.passes.core.folds",
    "LinearSite": "graftc.passes.core.sites",
    "Method": "graftc.passes.core.method",
    "NormSite": "graftc.passes.core.sites",
    "OutputObjective": "graftc.passes.core.steering",
    "ParameterSite": "graftc.passes.core.sites",
    "Place": "graftc.passes.core.steering",
    "Site": "graftc.passes.core.sites",
    "SiteKey": "graftc.passes.core.sites",
    "StandIn": "graftc.passes.core.folds",
    "SublayerSite": "graftc.passes.core.sites",
    "TensorFold": "graftc.passes.core.folds",
    "TensorObjective": "graftc.passes.core.steering",
    "ValueSite": "graftc.passes.core.sites",
    "WeightFold": "graftc.passes.core.folds",
    "check_rank": "graftc.passes.core.lowrank",
    "effective_weight": "graftc.passes.core.effective_weight",
    "factors": "graftc.passes.core.lowrank",
    "normal": "graftc.passes.core.lowrank",
    "pick": "graftc.passes.core.routing",
    "route": "graftc.passes.core.routing",
    "uniform": "graftc.passes.core.lowrank",
    "zeros": "graftc.passes.core.lowrank",
}
"""What the code of a method needs."""

if TYPE_CHECKING:
    from graftc.passes.core.builder import Builder
    from graftc.passes.core.effective_weight import effective_weight
    from graftc.passes.core.folds import Fold, Keep, StandIn, TensorFold, WeightFold
    from graftc.passes.core.lowrank import check_rank, factors, normal, uniform, zeros
    from graftc.passes.core.method import Method
    from graftc.passes.core.routing import pick, route
    from graftc.passes.core.sites import (
        AttentionSite,
        LinearSite,
        NormSite,
        ParameterSite,
        Site,
        SiteKey,
        SublayerSite,
        ValueSite,
    )
    from graftc.passes.core.stages import Advance
    from graftc.passes.core.steering import Controller, OutputObjective, Place, TensorObjective
    from graftc.passes.core.windows import BaseGradients
    from graftc.specs.base import MethodSpec
    from graftc.specs.base_model import Items
    from graftc.specs.claims import Claims, FoldKind, SiteKind
    from graftc.specs.diagnostics import GraftError
    from graftc.specs.overrides import Override
    from graftc.specs.target import Target
    from graftc.specs.virtual import VirtualRun

__all__ = [
    "Advance",
    "AttentionSite",
    "BaseGradients",
    "Builder",
    "Claims",
    "Controller",
    "Fold",
    "FoldKind",
    "GraftError",
    "Items",
    "Keep",
    "LinearSite",
    "Method",
    "MethodSpec",
    "NormSite",
    "OutputObjective",
    "Override",
    "ParameterSite",
    "Place",
    "Site",
    "SiteKey",
    "SiteKind",
    "StandIn",
    "SublayerSite",
    "Target",
    "TensorFold",
    "TensorObjective",
    "ValueSite",
    "VirtualRun",
    "WeightFold",
    "check_rank",
    "effective_weight",
    "factors",
    "normal",
    "pick",
    "route",
    "uniform",
    "zeros",
]


def __getattr__(name: str) -> Any:
    import importlib

    module = _SPEC.get(name) or _METHOD.get(name)
    if module is None:
        raise AttributeError(f"module 'graftc.extend' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
