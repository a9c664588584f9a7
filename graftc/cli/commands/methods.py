"""``graftc methods``: list the methods with their claims, or show one method's page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.cli import completion
from graftc.cli.command import CommandRun, command
from graftc.specs.claims import MethodInfo
from graftc.specs.records.record import Record

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.specs.registry import SpecEntry

_COMMON = ("name", "method", "target", "dtype")
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


@dataclass(frozen=True)
class MethodsResult(Record):
    """`graftc methods --json`."""

    methods: tuple[MethodInfo, ...]
    """Every method, in the order of their tags."""


@dataclass(frozen=True)
class MethodPage(MethodInfo, published="MethodPage"):
    """`graftc methods NAME --json`."""

    description: str
    """The whole text about it."""

    schema: dict[str, Any]
    """JSON Schema of its adaptations."""


@command()
def methods(
    run: CommandRun,
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="Show this method's page.",
            show_default=False,
            autocompletion=completion.methods,
        ),
    ] = None,
) -> MethodsResult | MethodPage:
    """List the methods with their claims, or show one method's page."""
    from graftc.specs.listing import method_info
    from graftc.specs.listing import methods as listing
    from graftc.specs.registry import method_specs, unknown_method

    if name is None:
        return MethodsResult(tuple(listing()))
    entry = method_specs().get(name)
    if entry is None:
        raise unknown_method(name)
    return MethodPage(
        **vars(method_info(entry)), description=_description(entry), schema=entry.spec_class.model_json_schema()
    )


@methods.shows
def _show(result: MethodsResult | MethodPage, to: Console) -> None:
    if isinstance(result, MethodPage):
        _print_page(to, result)
    else:
        _print_list(to, result)


def _print_list(to: Console, result: MethodsResult) -> None:
    from graftc.cli.output import print_table

    rows = [
        (
            info.tag,
            ", ".join(sorted(info.claims.sites)),
            _yes(info.claims.identity_at_init),
            str(info.claims.folds),
            _yes(info.claims.bankable),
            info.summary.replace("`", ""),
        )
        for info in result.methods
    ]
    print_table(to, ("method", "sites", "identity at init", "folds", "bankable", "summary"), rows)
    to.print()
    to.print("graftc methods NAME shows a method's fields and papers.")


def _print_page(to: Console, page: MethodPage) -> None:
    from rich.text import Text

    from graftc.cli.output import print_table
    from graftc.specs.registry import method_specs

    claims = page.claims
    to.print(Text(page.tag, style="bold"))
    to.print(Text(page.description), soft_wrap=True)
    to.print()
    facts = [
        ("sites", ", ".join(sorted(claims.sites))),
        ("identity at init", _yes(claims.identity_at_init)),
        ("folds", str(claims.folds)),
        ("bankable", _yes(claims.bankable)),
    ]
    if claims.inert:
        facts.append(("no gradient at first", ", ".join(sorted(claims.inert))))
    facts += [("paper", paper) for paper in page.paper.split("; ") if paper]
    facts.append(("module", page.module))
    for name, fact in facts:
        to.print(Text(f"{name + ':':<18}{fact}"), soft_wrap=True)
    to.print()
    rows = [
        (name, _type(field), _default(field), str(field.get("description", "")).replace("`", "").replace("\n", " "))
        for name, field in page.schema["properties"].items()
        if name not in _COMMON
    ]
    print_table(to, ("field", "type", "default", "meaning"), rows)
    to.print()
    to.print(Text(_example(method_specs()[page.tag]), style="cyan"), soft_wrap=True)


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
    """Return a valid adaptation for a spec, with the method's default target or with roles that it accepts."""
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
