"""docs/spec.md: the reference of specs, generated from the models of ``graftc.specs``."""

from __future__ import annotations

from inspect import getdoc

from pydantic import BaseModel

from graftc.specs import limits
from graftc.specs.base import MethodSpec, Override
from graftc.specs.compose import CompositionSpec, composition_kinds
from graftc.specs.document import Spec
from graftc.specs.patterns import BRANCHES, NESTED, PATTERNS, expand_braces, glob_to_regex, layer_indices
from graftc.specs.regexes import SECONDS
from graftc.specs.roles import PREFIXES, ROLES, widen
from graftc.specs.target import Target
from tools.docs.fields import field_table, nested_models
from tools.docs.markdown import code, fence, header, prose, table

__all__ = ["EXAMPLE", "SECTIONS", "render_spec"]

SECTIONS = {
    "Target": "targets",
    "glob": "globs",
    "layer": "layers",
    "regex": "regular-expressions",
    "role": "roles",
}
"""The anchors of the sections that explain the names in a spec's JSON Schema."""

EXAMPLE = """\
version: 1
adapt:
  - name: attention
    method: lora
    target: {role: [attn.q, attn.v], layers: "0:6"}
    rank: 8
    alpha: 16
    overrides:
      - {layers: 0, rank: 4}
  - name: inner
    method: lora
    target: {modules: "**.output.dense", exclude: "**.attention.**"}
    rank: 2
train: [classifier]
checkpoint: layers
fold: {budget: {logits: 0.001}}
"""

_INTRO = """\
A spec says which sites of a model get which adaptation, and what else is trained. The same document can be written in
YAML, JSON, TOML or Python; this page shows YAML. `graftc schema` prints its JSON Schema, which editors can use for
validation.

All objects described here are closed and strict: an unknown field is an error ([GC003](errors.md#gc003)), a string is
not converted to a number, and every pattern must match something ([GC011](errors.md#gc011)).
"""

_ADAPTATIONS = """\
An entry of `adapt`. The fields below are common to all methods; each method has additional fields, listed on [its
page](methods/index.md). Adaptations are inserted and folded in list order; several of them may stack on the same rows
of one weight.
"""

_TARGETS_AFTER = """\
Selectors are combined with AND: a site must match each of `role`, `modules` and `regex` that is given, must be in
`layers`, and must not be in `exclude`. A site is a stored weight, or the rows of one that belong to a role, however
often the model uses it.

Nothing is skipped silently. Every list item, every brace branch, every entry of `layers` and every exclusion must
match; a role that only some layers have is an error as well, unless `layers` or `expect` allows for it.

In Python, `graftc.select(model)` counts and combines sites before a spec is written, and stands where a target does:
[Explore before you write](select.md).
"""

_GLOBS_TEXT = """\
`modules` and `exclude` match whole module paths, as returned by `model.named_modules()`. `*` matches any characters
within one segment, `**` as a segment matches any number of segments, and `{a,b}` matches either alternative. Quote a
pattern that starts with `*`, because YAML gives an unquoted `*` another meaning.
"""
_REGEX_TEXT = """\
`regex` takes Python regular expressions. They match the whole path, so an expression for the end of a path starts
with `.*`. Lookahead and lookbehind are supported. Matching time is limited ([GC008](errors.md#gc008)): nested
repetitions may exceed the limit, which globs never do.
"""
_LAYERS_TEXT = """\
Layers are numbered from 0 in each stack of repeated layers; in an encoder-decoder model `layers` applies to both stacks
unless the role has the prefix `encoder.` or `decoder.`. Slices follow Python and are written as strings.
"""
_OVERRIDES = """\
A method with an `overrides` field can use different values for some of its sites. Each override specifies to which of
the sites selected by the target it applies, and which values change there. The first override that matches a site
applies, and an override that is never used is an error. The method's page lists the values that can change.
"""
_LIMITS = """\
Exceeding one of these limits is an error ([GC009](errors.md#gc009)) that is raised before anything else is checked, for
files and in Python alike.
"""
_ROLES_TEXT = """\
A role describes what a site does in the architecture. Roles are derived from the data flow of the graph, not from
names; `graftc roles MODEL` prints the roles of a model with the evidence for each, and the sites it could not
resolve. [Coverage](coverage.md) reports how well this works for the architectures in transformers.
"""

_PATHS = (
    "encoder.layer.0.query",
    "encoder.layer.0.value",
    "encoder.layer.1.query",
    "encoder.layer.1.value",
    "pooler",
)
_GLOBS = (
    "encoder.layer.0.*",
    "encoder.layer.*.query",
    "**.query",
    "**.layer.1.**",
    "**.{query,value}",
    "encoder.*",
    "pool*",
)
_LAYERS: tuple[int | str, ...] = (0, -1, "0:3", "4:", "::2", "-2:")
_DEPTH = 6


def render_spec() -> str:
    """Return the text of the page."""
    parts = [
        header("Spec reference"),
        _INTRO,
        fence(EXAMPLE, "yaml"),
        "## The document\n",
        field_table(Spec, _link),
        *_sections(),
        "## Adaptations\n",
        _ADAPTATIONS,
        field_table(MethodSpec, _link),
        "## Targets\n",
        prose(getdoc(Target) or "") + "\n",
        field_table(Target, _link),
        _TARGETS_AFTER,
        *_languages(),
        "## Overrides\n",
        _OVERRIDES,
        field_table(Override, _link),
        "## Roles\n",
        *_roles(),
        "## Limits\n",
        _LIMITS,
        table(("what", "at most"), _limits()),
    ]
    return "\n".join(parts)


def _limits() -> list[tuple[str, str]]:
    return [
        ("a file, or a string that is parsed", f"{limits.FILE:,} bytes"),
        ("nesting", f"{limits.DEPTH} levels"),
        ("values, including mappings and lists; the values behind an alias count each time", f"{limits.VALUES:,}"),
        ("adaptations, and compositions", f"{limits.ADAPTATIONS:,} each"),
        ("tokens to add", f"{limits.TOKENS:,}"),
        ("a string, a key, a pattern", f"{limits.TEXT:,} characters"),
        ("the name of an adaptation or composition", f"{limits.NAME} characters"),
        ("an integer", "63 bits and a sign; 9 digits for a layer or row"),
        ("a rank, width or length", f"{limits.SIZE:,}"),
        ("alternatives of a pattern with braces", f"{BRANCHES:,}; braces {NESTED} deep"),
        (
            "all patterns together, with braces expanded and counts `{n}` in regular expressions multiplied out",
            f"{PATTERNS:,} characters",
        ),
        ("time for matching all regular expressions of a spec", f"{SECONDS:g} s of CPU time"),
    ]


def _sections() -> list[str]:
    """Return the sections of the models nested in the document, without adaptations."""
    parts: list[str] = []
    for model in _inner():
        parts += [f"### {model.__name__}\n", prose(getdoc(model) or "") + "\n", field_table(model, _link)]
    return parts


def _inner() -> list[type[BaseModel]]:
    models = nested_models(Spec, skip=MethodSpec)
    return [model for model in models if not issubclass(model, CompositionSpec)] + list(composition_kinds().values())


def _link(name: str) -> str | None:
    if name in SECTIONS:
        return f"#{SECTIONS[name]}"
    return f"#{name.lower()}" if name in {model.__name__ for model in _inner()} else None


def _languages() -> list[str]:
    paths = {glob: [code(path) for path in _PATHS if glob_to_regex(glob).fullmatch(path)] for glob in _GLOBS}
    layers = {_entry(entry): sorted(layer_indices(entry, _DEPTH)) for entry in _LAYERS}
    brace = "attn.{q,v}"
    return [
        "### Globs\n",
        _GLOBS_TEXT,
        f"Among the paths {', '.join(map(code, _PATHS))}:\n",
        table(("glob", "matches"), [(code(glob), ", ".join(matched) or "none") for glob, matched in paths.items()]),
        "### Regular expressions\n",
        _REGEX_TEXT,
        "### Braces in roles\n",
        f"Roles have no wildcards, but they may contain braces: {code(brace)} stands for "
        f"{' and '.join(map(code, expand_braces(brace)))}.\n",
        "### Layers\n",
        _LAYERS_TEXT,
        f"In a stack of {_DEPTH} layers:\n",
        table(("entry", "layers"), [(entry, ", ".join(map(str, indices))) for entry, indices in layers.items()]),
        'Write several entries as a list: `layers: [0, "4:"]`.\n',
    ]


def _entry(entry: int | str) -> str:
    return code(f'"{entry}"' if isinstance(entry, str) else str(entry))


def _roles() -> list[str]:
    role = "decoder.cross.attn.k"
    spellings = ", ".join(code(name) for name in sorted(widen(role), key=lambda name: (name.count("."), name)))
    rows = [(code(info.name), str(info.kind), info.meaning) for info in ROLES.values()]
    return [
        _ROLES_TEXT,
        table(("role", "kind of site", "meaning"), rows),
        f"A role may have prefixes: {', '.join(code(prefix + '.') for prefix in PREFIXES)}, in this order. A site\n"
        f"matches its full role and every shorter spelling: a {code(role)} is selected by {spellings}.\n",
    ]
