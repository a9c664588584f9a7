"""The published JSON Schemas: for specs, PET specs, artifact manifests, and the output of each command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from graftc.cli.registry import commands
from graftc.records.reading import json_schema
from graftc.specs.errors.diagnostics import GraftError, nearest

DIALECT = "https://json-schema.org/draft/2020-12/schema"
"""The dialect of the schemas."""


def _spec() -> dict[str, Any]:
    from graftc.specs.document import Spec

    return Spec.model_json_schema()


def _pet_spec() -> dict[str, Any]:
    from graftc.specs.pet.document import PetSpec

    return PetSpec.model_json_schema()


def _manifest() -> dict[str, Any]:
    from graftc.runtime.artifact.manifest import Manifest

    return json_schema(Manifest, mode="validation")


def _error() -> dict[str, Any]:
    from graftc.records.diagnostics import ErrorResult

    return json_schema(ErrorResult)


def _methods() -> dict[str, Any]:
    schema = json_schema(commands()["methods"].result)
    return {"title": "Methods", "description": "`graftc methods [NAME] --json`: the list, or one page.", **schema}


def _demo(llm: bool) -> dict[str, Any]:
    from graftc.records.applications.demo import DemoResult, LLMResult

    return json_schema(LLMResult if llm else DemoResult)


def _of_command(name: str) -> dict[str, Any]:
    return json_schema(commands()[name].result)


def _builders() -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "spec": _spec,
        "manifest": _manifest,
        "pet-spec": _pet_spec,
        "error": _error,
        **{name: partial(_of_command, name) for name in commands() if name != "schema"},
        "methods": _methods,
        "demo": partial(_demo, False),
        "demo-llm": partial(_demo, True),
    }


def schema_names() -> list[str]:
    """Return the names of the published schemas."""
    return list(_builders())


def published_schema(name: str) -> dict[str, Any]:
    """Return one published JSON Schema.

    Raises:
        GraftError: GC090, with the nearest name, if there is no schema with this name.
    """
    builders = _builders()
    if name not in builders:
        close = nearest(name, list(builders), n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"the schemas are: {', '.join(builders)}"
        raise GraftError("GC090", f"there is no schema '{name}'", hint=hint)
    return {"$schema": DIALECT, **builders[name]()}


def published_schemas() -> dict[str, dict[str, Any]]:
    """Return every published JSON Schema by name: the contents of ``docs/schemas``."""
    return {name: published_schema(name) for name in _builders()}
