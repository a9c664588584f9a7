"""``graftc schema``: the JSON Schema of a spec."""

from __future__ import annotations

from graftc.runtime.cli.options import Json

__all__ = ["schema"]


def schema(json: Json = True) -> None:
    """Print the JSON Schema of a spec, for editors and validators."""
    from graftc.runtime.cli.output import print_json
    from graftc.specs.document import Spec

    print_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()})
