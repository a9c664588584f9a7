"""The output of commands with ``--json``: one pydantic model for each, and the JSON Schemas made of them. No torch.

Names are loaded when first used, so that a command builds the models of its own output only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftc.cli.results.base import DiagnosticData as DiagnosticData
    from graftc.cli.results.base import ErrorResult as ErrorResult
    from graftc.cli.results.base import FileData as FileData
    from graftc.cli.results.base import Result as Result
    from graftc.cli.results.cards import CardMetadata as CardMetadata
    from graftc.cli.results.cards import CardResult as CardResult
    from graftc.cli.results.converting import ConvertedSiteData as ConvertedSiteData
    from graftc.cli.results.converting import ConvertResult as ConvertResult
    from graftc.cli.results.demo import DemoData as DemoData
    from graftc.cli.results.demo import LLMDemoData as LLMDemoData
    from graftc.cli.results.generating import ChatResult as ChatResult
    from graftc.cli.results.generating import GenerateResult as GenerateResult
    from graftc.cli.results.listing import MethodPage as MethodPage
    from graftc.cli.results.listing import MethodsResult as MethodsResult
    from graftc.cli.results.listing import RolesResult as RolesResult
    from graftc.cli.results.publish import DIALECT as DIALECT
    from graftc.cli.results.publish import SCHEMA_NAMES as SCHEMA_NAMES
    from graftc.cli.results.publish import published_schema as published_schema
    from graftc.cli.results.publish import published_schemas as published_schemas
    from graftc.cli.results.training import PetRunResult as PetRunResult
    from graftc.cli.results.views import InspectResult as InspectResult
    from graftc.cli.results.work import CheckData as CheckData
    from graftc.cli.results.work import CheckResult as CheckResult
    from graftc.cli.results.work import CompileResult as CompileResult
    from graftc.cli.results.work import DiffResult as DiffResult
    from graftc.cli.results.work import ExportResult as ExportResult
    from graftc.cli.results.work import ImportPeftResult as ImportPeftResult
    from graftc.cli.results.work import KeptData as KeptData
    from graftc.cli.results.work import MergeResult as MergeResult
    from graftc.cli.results.work import PeftTensorData as PeftTensorData
    from graftc.cli.results.work import SiteChanges as SiteChanges
    from graftc.cli.results.work import StreamedData as StreamedData
    from graftc.cli.results.work import TensorChange as TensorChange
    from graftc.cli.results.work import VerifyResult as VerifyResult

_HOME = {
    "base": ("DiagnosticData", "ErrorResult", "FileData", "Result"),
    "cards": ("CardMetadata", "CardResult"),
    "converting": ("ConvertResult", "ConvertedSiteData"),
    "demo": ("DemoData", "LLMDemoData"),
    "generating": ("ChatResult", "GenerateResult"),
    "listing": ("MethodPage", "MethodsResult", "RolesResult"),
    "publish": ("DIALECT", "SCHEMA_NAMES", "published_schema", "published_schemas"),
    "training": ("PetRunResult",),
    "views": ("InspectResult",),
    "work": (
        *("CheckData", "CheckResult", "CompileResult", "DiffResult", "ExportResult", "KeptData", "MergeResult"),
        *("ImportPeftResult", "PeftTensorData", "SiteChanges", "StreamedData", "TensorChange", "VerifyResult"),
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [*_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
