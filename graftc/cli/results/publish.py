"""The published JSON Schemas: of specs, PET specs and manifests of artifacts, and of the output of each command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode

from graftc.specs.errors.diagnostics import GraftError, nearest
from graftc.specs.schema import SchemaWriter

__all__ = ["DIALECT", "SCHEMA_NAMES", "published_schema", "published_schemas"]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
"""The dialect of the schemas."""


def _model(kind: Any, *, mode: JsonSchemaMode = "serialization") -> dict[str, Any]:
    return TypeAdapter(kind).json_schema(mode=mode, by_alias=True, schema_generator=SchemaWriter)


def _spec() -> dict[str, Any]:
    from graftc.specs.document import Spec

    return Spec.model_json_schema()


def _pet_spec() -> dict[str, Any]:
    from graftc.specs.pet.document import PetSpec

    return PetSpec.model_json_schema()


def _manifest() -> dict[str, Any]:
    from graftc.runtime.artifact.manifest import Manifest

    return _model(Manifest, mode="validation")


def _methods() -> dict[str, Any]:
    from graftc.cli.results.listing import MethodPage, MethodsResult

    schema = _model(MethodsResult | MethodPage)
    return {"title": "Methods", "description": "`graftc methods [NAME] --json`: the list, or one page.", **schema}


def _work(name: str) -> dict[str, Any]:
    from graftc.cli.results import work

    return _model(getattr(work, name))


def _roles() -> dict[str, Any]:
    from graftc.cli.results.listing import RolesResult

    return _model(RolesResult)


def _inspect() -> dict[str, Any]:
    from graftc.cli.results.views import InspectResult

    return _model(InspectResult)


def _card() -> dict[str, Any]:
    from graftc.cli.results.cards import CardResult

    return _model(CardResult)


def _demo(name: str) -> dict[str, Any]:
    from graftc.cli.results import demo

    return _model(getattr(demo, name))


def _convert() -> dict[str, Any]:
    from graftc.cli.results.converting import ConvertResult

    return _model(ConvertResult)


def _generating(name: str) -> dict[str, Any]:
    from graftc.cli.results import generating

    return _model(getattr(generating, name))


def _pet() -> dict[str, Any]:
    from graftc.cli.results.training import PetRunResult

    return _model(PetRunResult)


def _error() -> dict[str, Any]:
    from graftc.cli.results.base import ErrorResult

    return _model(ErrorResult)


_BUILDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "spec": _spec,
    "manifest": _manifest,
    "pet-spec": _pet_spec,
    "error": _error,
    "methods": _methods,
    "roles": _roles,
    "check": partial(_work, "CheckResult"),
    "compile": partial(_work, "CompileResult"),
    "import-peft": partial(_work, "ImportPeftResult"),
    "merge": partial(_work, "MergeResult"),
    "convert": _convert,
    "export": partial(_work, "ExportResult"),
    "card": _card,
    "verify": partial(_work, "VerifyResult"),
    "diff": partial(_work, "DiffResult"),
    "generate": partial(_generating, "GenerateResult"),
    "chat": partial(_generating, "ChatResult"),
    "pet": _pet,
    "inspect": _inspect,
    "demo": partial(_demo, "DemoData"),
    "demo-llm": partial(_demo, "LLMDemoData"),
}

SCHEMA_NAMES: tuple[str, ...] = tuple(_BUILDERS)
"""The names of the published schemas."""


def published_schema(name: str) -> dict[str, Any]:
    """Return one published JSON Schema.

    Raises:
        GraftError: GC090 with the nearest name, if there is no schema of this name.
    """
    build = _BUILDERS.get(name)
    if build is None:
        close = nearest(name, SCHEMA_NAMES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the schemas are: {', '.join(SCHEMA_NAMES)}"
        raise GraftError("GC090", f"there is no schema '{name}'", hint=hint)
    return {"$schema": DIALECT, **build()}


def published_schemas() -> dict[str, dict[str, Any]]:
    """Return every published JSON Schema by name: the contents of ``docs/schemas``."""
    return {name: published_schema(name) for name in SCHEMA_NAMES}
