"""docs/methods/: a list of the built-in methods, and a page for each.

Plugins are left out: they have their own pages, and a page must not depend on what is installed.
"""

from __future__ import annotations

import json
import re
from inspect import getdoc

from graftc.passes.core.method.registry import method_for
from graftc.specs.base import MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.io import parse_spec
from graftc.specs.registry import SpecEntry, method_specs
from graftc.specs.roles import ROLES
from graftc.specs.target import Target
from tools.docs.fields import field_table, nested_models
from tools.docs.markdown import code, fence, header, prose, table
from tools.docs.spec import SECTIONS

__all__ = ["built_in", "example", "render_methods"]

_INTRO = """\
Each entry of `adapt` names one of these methods as `method`. `graftc methods` prints this list, including installed
plugins, and `graftc methods NAME` prints a method's page.
"""
_CLAIMS = """\
The columns are claims. The [contract tests](../writing-a-method.md#hold-it-to-the-contract) check them for each method:

- **sites**: the kinds of site the method can adapt; the table of [roles](../spec.md#roles) gives the kind of each role.
- **identity at init**: before training, the outputs of the adapted model equal the base's bit for bit.
- **folds**: `exact` folds can be merged into base weights; `none` means that it stays in the graph.
- **bankable**: several adaptations of the same shape could be stacked in one tensor, and one selected per row.
"""
_FOLDS = {
    FoldKind.EXACT: "yes, into base weights that compute the same function",
    FoldKind.NONE: "no, it stays in the graph",
}


def built_in() -> list[SpecEntry]:
    """Return the methods of graftc itself, in the order of their tags."""
    return [entry for entry in method_specs().values() if entry.module.startswith("graftc.specs.")]


def render_methods() -> dict[str, str]:
    """Return the list and every method's page, by path in the docs folder."""
    pages = {f"methods/{entry.tag}.md": _page(entry) for entry in built_in()}
    return {"methods/index.md": _index(built_in()), **pages}


def _index(entries: list[SpecEntry]) -> str:
    rows = [
        (
            f"[{entry.tag}]({entry.tag}.md)",
            _kinds(entry.claims),
            _yes(entry.claims.identity_at_init),
            str(entry.claims.folds),
            _yes(entry.claims.bankable),
            prose(entry.summary),
        )
        for entry in entries
    ]
    parts = [
        header("Methods"),
        _INTRO,
        table(("method", "sites", "identity at init", "folds", "bankable", "summary"), rows),
        _CLAIMS,
        "To add your own method, write two modules in a package: see [Writing a method](../writing-a-method.md).\n",
    ]
    return "\n".join(parts)


def _page(entry: SpecEntry) -> str:
    claims = entry.claims
    facts = [
        ("sites", _kinds(claims)),
        ("identity at init", _yes(claims.identity_at_init)),
        ("folds", _FOLDS[claims.folds]),
        ("bankable", _yes(claims.bankable)),
    ]
    if claims.inert:
        facts.append(("tensors without a gradient at first", ", ".join(map(code, sorted(claims.inert)))))
    runs = f", runs the code of {code(entry.mechanism)}" if entry.mechanism else f" and {code(entry.method_module)}"
    facts.append(("defined in", code(entry.module) + runs))
    parts = [
        header(entry.tag),
        prose(getdoc(entry.spec_class) or "") + "\n",
        fence(example(entry), "yaml"),
        "## Claims\n",
        table(("claim", "value"), facts),
        "## Fields\n",
        "`method`, `name` and `target` are [common to all methods](../spec.md#adaptations).\n",
        field_table(entry.spec_class, _link, without=_common(entry.spec_class)),
        *_inner(entry.spec_class),
        "## How it works\n",
        prose(getdoc(type(method_for(entry.tag))) or "") + "\n",
        *_papers(entry.paper),
    ]
    return "\n".join(parts)


def _common(spec_class: type[MethodSpec]) -> set[str]:
    """Return the fields that all methods share; ``target`` belongs to a method that has its own default for it."""
    own = {"target"} if isinstance(spec_class.model_fields["target"].default, Target) else set()
    return set(MethodSpec.model_fields) - own


def _inner(spec_class: type[MethodSpec]) -> list[str]:
    parts: list[str] = []
    for model in nested_models(spec_class, skip=MethodSpec):
        if model is Target:
            continue
        parts += [f"### {model.__name__}\n", prose(getdoc(model) or "") + "\n"]
        if issubclass(model, Override):
            parts.append("`role`, `modules` and `layers` select its sites, [as in a target](../spec.md#overrides).\n")
        without = set(Override.model_fields) if issubclass(model, Override) else set()
        parts.append(field_table(model, _link, without=without))
    return parts


def _link(name: str) -> str:
    return f"../spec.md#{SECTIONS[name]}" if name in SECTIONS else f"#{name.lower()}"


def _papers(text: str) -> list[str]:
    papers = [paper for paper in text.split("; ") if paper]
    return ["## Papers\n", "".join(f"- {prose(paper)}\n" for paper in papers)] if papers else []


def example(entry: SpecEntry) -> str:
    """Return a spec with this method.

    It has its own placement or roles of kinds that the method takes, the examples of fields that it needs, and its
    first numbers at their defaults.

    Raises:
        GraftError: the example is not a valid spec.
    """
    lines = ["version: 1", "adapt:", f"  - method: {entry.tag}"]
    fields = entry.spec_class.model_fields
    if not isinstance(fields["target"].default, Target):
        fits = [role.name for role in ROLES.values() if role.kind in entry.claims.sites and role.name != "head"]
        if SiteKind.LINEAR in entry.claims.sites:
            fits = ["attn.q", "attn.v"]
        lines.append(f"    target: {{role: [{', '.join(fits[:2])}]}}")
    lines += [f"    {name}: {json.dumps(value)}" for name, value in entry.needed.items()]
    numbers = [name for name, info in fields.items() if type(info.default) in (int, float) and info.default]
    lines += [f"    {name}: {re.sub(r'[.]0$', '', str(fields[name].default))}" for name in numbers[:3]]
    text = "\n".join(lines) + "\n"
    parse_spec(text)
    return text


def _kinds(claims: Claims) -> str:
    return ", ".join(sorted(claims.sites))


def _yes(value: bool) -> str:
    return "yes" if value else "no"
