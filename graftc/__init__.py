"""graftc: a declarative graph-rewriting compiler for parameter-efficient fine-tuning."""

from __future__ import annotations

from graftc.version import __version__

# Not from typing: a command must be able to handle an interrupt before anything that takes time is imported.
TYPE_CHECKING = False

_FACADE = {
    "GraftError": "graftc.specs.errors.diagnostics",
    "GraftWarning": "graftc.specs.errors.diagnostics",
    "Spec": "graftc.specs.document",
    "load_spec": "graftc.specs.io",
    "Certificate": "graftc.records.certificate",
    "Compiled": "graftc.runtime.compiled",
    "Merged": "graftc.runtime.deploy.merged",
    "Report": "graftc.records.report",
    "Selection": "graftc.compiler.resolve.selection",
    "AdapterPool": "graftc.runtime.offered.pool",
    "compile": "graftc.runtime.api",
    "check": "graftc.runtime.api",
    "load": "graftc.runtime.api",
    "load_base": "graftc.runtime.api",
    "import_peft": "graftc.runtime.api",
    "merge_checkpoint": "graftc.runtime.streaming.merging",
    "share_base": "graftc.runtime.deploy.shared_base",
    "roles": "graftc.runtime.api",
    "select": "graftc.runtime.api",
    "serve_check": "graftc.applications.serving.checking",
    "serve_plan": "graftc.applications.serving.planning",
    "ServingPlan": "graftc.records.serving.plans",
    "ServingCertificate": "graftc.records.serving.certificates",
    "sweep": "graftc.applications.recipes.sweep",
    "tune": "graftc.applications.recipes.tune",
    "pet": "graftc.applications.pet.recipe",
    "plan": "graftc.applications.planner.planning",
    "MemoryPlan": "graftc.records.applications.memory",
    "methods": "graftc.specs.listing",
    "TrainingLog": "graftc.runtime.training.log",
    "read_log": "graftc.runtime.training.curves",
}
_MODULES = {"extend": "graftc.extend", "optim": "graftc.runtime.optim", "testing": "graftc.testing"}

if TYPE_CHECKING:
    from typing import Any

    from graftc import extend, testing
    from graftc.applications.pet.recipe import pet
    from graftc.applications.planner.planning import plan
    from graftc.applications.recipes.sweep import sweep
    from graftc.applications.recipes.tune import tune
    from graftc.applications.serving.checking import serve_check
    from graftc.applications.serving.planning import serve_plan
    from graftc.compiler.resolve.selection import Selection
    from graftc.records.applications.memory import MemoryPlan
    from graftc.records.certificate import Certificate
    from graftc.records.report import Report
    from graftc.records.serving.certificates import ServingCertificate
    from graftc.records.serving.plans import ServingPlan
    from graftc.runtime import optim
    from graftc.runtime.api import check, compile, import_peft, load, load_base, roles, select
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged
    from graftc.runtime.deploy.shared_base import share_base
    from graftc.runtime.offered.pool import AdapterPool
    from graftc.runtime.streaming.merging import merge_checkpoint
    from graftc.runtime.training.curves import read_log
    from graftc.runtime.training.log import TrainingLog
    from graftc.specs.document import Spec
    from graftc.specs.errors.diagnostics import GraftError, GraftWarning
    from graftc.specs.io import load_spec
    from graftc.specs.listing import methods

__all__ = [
    "AdapterPool",
    "Certificate",
    "Compiled",
    "GraftError",
    "GraftWarning",
    "MemoryPlan",
    "Merged",
    "Report",
    "Selection",
    "ServingCertificate",
    "ServingPlan",
    "Spec",
    "TrainingLog",
    "__version__",
    "check",
    "compile",
    "extend",
    "import_peft",
    "load",
    "load_base",
    "load_spec",
    "merge_checkpoint",
    "methods",
    "optim",
    "pet",
    "plan",
    "read_log",
    "roles",
    "select",
    "serve_check",
    "serve_plan",
    "share_base",
    "sweep",
    "testing",
    "tune",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _FACADE:
        return getattr(importlib.import_module(_FACADE[name]), name)
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    raise AttributeError(f"module 'graftc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
