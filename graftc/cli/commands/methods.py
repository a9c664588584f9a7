"""``graftc methods``: the methods with their claims, or one method's page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.cli import completion
from graftc.cli.options import Json

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.specs.registry import SpecEntry

__all__ = ["methods"]

_COMMON = ("name", "method", "target", "dtype")
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


def methods(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Show this method's page.",
            show_default=False,
            autocompletion=completion.methods,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the methods with their claims, or show one method's page."""
    from graftc.cli.output import console, print_json
    from graftc.specs.listing import methods as listing
    from graftc.specs.registry import method_specs, unknown_method

    if name is None:
        if json:
            from graftc.cli.results import MethodsResult

            print_json(MethodsResult.model_validate({"methods": [info.to_json() for info in listing()]}))
        else:
            _print_list(console())
        return
    entry = method_specs().get(name)
    if entry is None:
        raise unknown_method(name)
    if json:
        from graftc.cli.results import MethodPage

        print_json(MethodPage.model_validate(_page_data(entry)))
    else:
        _print_page(console(), entry)


def _print_list(to: Console) -> None:
    from graftc.cli.output import print_table
    from graftc.specs.listing import methods as listing

    rows = [
        (
            info.tag,
            ", ".join(sorted(info.claims.sites)),
            _yes(info.claims.identity_at_init),
            str(info.claims.folds),
            _yes(info.claims.bankable),
            info.summary.replace("`", ""),
        )
        for info in listing()
    ]
    print_table(to, ("method", "sites", "identity at init", "folds", "bankable", "summary"), rows)
    to.print()
    to.print("graftc methods NAME shows a method's fields and papers.")


def _page_data(entry: SpecEntry) -> dict[str, Any]:
    from graftc.specs.listing import method_info

    return method_info(entry).to_json() | {
        "description": _description(entry),
        "schema": entry.spec_class.model_json_schema(),
    }


def _print_page(to: Console, entry: SpecEntry) -> None:
    from rich.text import Text

    from graftc.cli.output import print_table

    claims = entry.claims
    to.print(Text(entry.tag, style="bold"))
    to.print(Text(_description(entry)), soft_wrap=True)
    to.print()
    facts = [
        ("sites", ", ".join(sorted(claims.sites))),
        ("identity at init", _yes(claims.identity_at_init)),
        ("folds", str(claims.folds)),
        ("bankable", _yes(claims.bankable)),
    ]
    if claims.inert:
        facts.append(("no gradient at first", ", ".join(sorted(claims.inert))))
    facts += [("paper", paper) for paper in entry.paper.split("; ") if paper]
    facts.append(("module", entry.module))
    for name, fact in facts:
        to.print(Text(f"{name + ':':<18}{fact}"), soft_wrap=True)
    to.print()
    schema = entry.spec_class.model_json_schema()
    rows = [
        (name, _type(field), _default(field), str(field.get("description", "")).replace("`", "").replace("\n", " "))
        for name, field in schema["properties"].items()
        if name not in _COMMON
    ]
    print_table(to, ("field", "type", "default", "meaning"), rows)
    to.print()
    to.print(Text(_example(entry), style="cyan"), soft_wrap=True)


def _description(entry: SpecEntry) -> str:
    from inspect import getdoc

    return (getdoc(entry.spec_class) or "").strip()


def _type(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option) for option in field["anyOf"]))
    if "enum" in field:
        return ", ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if field.get("type") == "array":
        pair = field.get("prefixItems")
        return f"list of {_type({'anyOf': pair} if pair else field.get('items', {}))}"
    bounds = [f"{sign} {field[key]:g}" for key, sign in _BOUNDS if key in field]
    return " ".join([str(field.get("type", "any")), ", ".join(bounds)]).strip()


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "required"
    value = field["default"]
    if value is None or value in ([], ()):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _example(entry: SpecEntry) -> str:
    """Return an adaptation that is valid in a spec: with the method's own placement, or with roles that it accepts."""
    import json

    from graftc.specs.roles import ROLES
    from graftc.specs.target import Target

    lines = ["adapt:", f"  - method: {entry.tag}"]
    lines += [f"    {name}: {json.dumps(value)}" for name, value in entry.needed.items()]
    placed = entry.spec_class.model_fields["target"].default
    if isinstance(placed, Target):
        return "\n".join(lines)
    fits = [role.name for role in ROLES.values() if role.kind in entry.claims.sites and role.name != "head"]
    fits.sort(key=lambda name: not name.startswith("attn"))
    roles = ", ".join(fits[:2]) if fits else "..."
    return "\n".join([*lines, f"    target: {{role: [{roles}]}}"])


def _yes(value: bool) -> str:
    return "yes" if value else "no"
