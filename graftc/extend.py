"""Everything needed to write a method, a pass or an exporter: the only module, besides `graftc.testing`, that plugins
import.

Names are resolved on first access, so a module of specs that imports from here does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_SPEC = {
    "Claims": "graftc.specs.claims",
    "ExportOption": "graftc.runtime.export.exporter",
    "Exporter": "graftc.runtime.export.exporter",
    "FoldKind": "graftc.specs.claims",
    "GraftError": "graftc.specs.errors.diagnostics",
    "Items": "graftc.specs.base_model",
    "MethodSpec": "graftc.specs.base",
    "Override": "graftc.specs.overrides",
    "RankOverride": "graftc.specs.overrides",
    "SiteKind": "graftc.specs.claims",
    "Target": "graftc.specs.target",
    "VirtualRun": "graftc.specs.base",
}
"""Names for modules of specs, and for declaring an exporter."""

_CODE = {
    "AddedPass": "graftc.passes.core.added_passes",
    "AttentionSite": "graftc.passes.core.sites.sites",
    "BaseGradients": "graftc.passes.core.method.base_gradients",
    "Builder": "graftc.passes.core.build.builder",
    "Collapsing": "graftc.passes.core.method.capabilities",
    "Controller": "graftc.passes.core.method.steering",
    "Exchangeable": "graftc.passes.core.method.capabilities",
    "ExportJob": "graftc.runtime.export.job",
    "Figured": "graftc.passes.core.method.capabilities",
    "Fold": "graftc.passes.core.weights.folds",
    "Keep": "graftc.passes.core.weights.folds",
    "LinearSite": "graftc.passes.core.sites.sites",
    "Method": "graftc.passes.core.method.method",
    "NormSite": "graftc.passes.core.sites.sites",
    "Observed": "graftc.passes.core.method.capabilities",
    "OutputObjective": "graftc.passes.core.method.steering",
    "ParameterSite": "graftc.passes.core.sites.sites",
    "AdaptedSite": "graftc.passes.core.method.steering",
    "Pass": "graftc.passes.core.pipeline",
    "PassContext": "graftc.passes.core.pass_context",
    "Program": "graftc.passes.core.ir.program",
    "Ranked": "graftc.passes.core.method.capabilities",
    "Reading": "graftc.passes.core.method.capabilities",
    "Reselecting": "graftc.passes.core.method.capabilities",
    "Resized": "graftc.passes.core.method.capabilities",
    "RowWise": "graftc.passes.core.method.capabilities",
    "Scored": "graftc.passes.core.method.capabilities",
    "Initialised": "graftc.passes.core.method.capabilities",
    "PrincipalComponents": "graftc.passes.core.method.principal",
    "Scoring": "graftc.passes.core.method.scoring",
    "Site": "graftc.passes.core.sites.sites",
    "SiteKey": "graftc.passes.core.sites.sites",
    "Staged": "graftc.passes.core.method.capabilities",
    "StandIn": "graftc.passes.core.weights.folds",
    "SublayerSite": "graftc.passes.core.sites.sites",
    "TensorFold": "graftc.passes.core.weights.folds",
    "TensorObjective": "graftc.passes.core.method.steering",
    "Transition": "graftc.passes.core.method.capabilities",
    "ValueSite": "graftc.passes.core.sites.sites",
    "WeightFold": "graftc.passes.core.weights.folds",
    "check_rank": "graftc.passes.core.method.lowrank",
    "effective_weight": "graftc.passes.core.build.effective_weight",
    "factors": "graftc.passes.core.method.lowrank",
    "normal": "graftc.passes.core.method.lowrank",
    "pick": "graftc.passes.core.build.random_experts",
    "route": "graftc.passes.core.build.random_experts",
    "uniform": "graftc.passes.core.method.lowrank",
    "weight_fold": "graftc.passes.core.weights.folds",
    "zeros": "graftc.passes.core.method.lowrank",
}
"""Names for the code of a method, a pass or an exporter."""

if TYPE_CHECKING:
    from graftc.passes.core.added_passes import AddedPass
    from graftc.passes.core.build.builder import Builder
    from graftc.passes.core.build.effective_weight import effective_weight
    from graftc.passes.core.build.random_experts import pick, route
    from graftc.passes.core.ir.program import Program
    from graftc.passes.core.method.base_gradients import BaseGradients
    from graftc.passes.core.method.capabilities import (
        Collapsing,
        Exchangeable,
        Figured,
        Initialised,
        Observed,
        Ranked,
        Reading,
        Reselecting,
        Resized,
        RowWise,
        Scored,
        Staged,
        Transition,
    )
    from graftc.passes.core.method.lowrank import check_rank, factors, normal, uniform, zeros
    from graftc.passes.core.method.method import Method
    from graftc.passes.core.method.principal import PrincipalComponents
    from graftc.passes.core.method.scoring import Scoring
    from graftc.passes.core.method.steering import AdaptedSite, Controller, OutputObjective, TensorObjective
    from graftc.passes.core.pass_context import PassContext
    from graftc.passes.core.pipeline import Pass
    from graftc.passes.core.sites.sites import (
        AttentionSite,
        LinearSite,
        NormSite,
        ParameterSite,
        Site,
        SiteKey,
        SublayerSite,
        ValueSite,
    )
    from graftc.passes.core.weights.folds import Fold, Keep, StandIn, TensorFold, WeightFold, weight_fold
    from graftc.runtime.export.exporter import Exporter, ExportOption
    from graftc.runtime.export.job import ExportJob
    from graftc.specs.base import MethodSpec, VirtualRun
    from graftc.specs.base_model import Items
    from graftc.specs.claims import Claims, FoldKind, SiteKind
    from graftc.specs.errors.diagnostics import GraftError
    from graftc.specs.overrides import Override, RankOverride
    from graftc.specs.target import Target

__all__ = [
    "AdaptedSite",
    "AddedPass",
    "AttentionSite",
    "BaseGradients",
    "Builder",
    "Claims",
    "Collapsing",
    "Controller",
    "Exchangeable",
    "ExportJob",
    "ExportOption",
    "Exporter",
    "Figured",
    "Fold",
    "FoldKind",
    "GraftError",
    "Initialised",
    "Items",
    "Keep",
    "LinearSite",
    "Method",
    "MethodSpec",
    "NormSite",
    "Observed",
    "OutputObjective",
    "Override",
    "ParameterSite",
    "Pass",
    "PassContext",
    "PrincipalComponents",
    "Program",
    "RankOverride",
    "Ranked",
    "Reading",
    "Reselecting",
    "Resized",
    "RowWise",
    "Scored",
    "Scoring",
    "Site",
    "SiteKey",
    "SiteKind",
    "Staged",
    "StandIn",
    "SublayerSite",
    "Target",
    "TensorFold",
    "TensorObjective",
    "Transition",
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
    "weight_fold",
    "zeros",
]


def __getattr__(name: str) -> Any:
    import importlib

    module = _SPEC.get(name) or _CODE.get(name)
    if module is None:
        raise AttributeError(f"module 'graftc.extend' has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
