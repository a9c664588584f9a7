"""docs/spec.md: the reference of specs, from the models of ``graftc.specs``."""

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
"""Where the page explains what a JSON Schema of a spec refers to by name."""

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
A spec says which places of a model get which adaptation, and what else trains. YAML, JSON, TOML and Python hold the
same document; this page shows YAML. `graftc schema` prints its JSON Schema, which editors can check against.

Every model here is closed and strict: an unknown field is an error ([GC003](errors.md#gc003)), a text is not taken for
a number, and every pattern has to match something ([GC011](errors.md#gc011)).
"""

_ADAPTATIONS = """\
An entry of `adapt`. The fields below are common to all methods; each method has more of its own, listed on
[its page](methods/index.md). Adaptations are inserted, and folded, in the order of the list; two of them may stack on
the same rows of one weight.
"""

_TARGETS_AFTER = """\
Selectors add up: a site has to meet each of `role`, `modules` and `regex` that is given, then be in `layers`, then
not be in `exclude`. A site is a stored weight, or the rows of one that a role owns, however often the model uses it.

Nothing is skipped silently. Every item of a list, every branch of a brace, every entry of `layers` and every exclusion
must match; a role that some layers have and others lack is an error as well, unless `layers` or `expect` says so.
"""

_GLOBS_TEXT = """\
`modules` and `exclude` match whole paths of modules, as `model.named_modules()` gives them. `*` stands for any
characters within one segment, `**` as a segment for any number of segments, `{a,b}` for either. Quote a pattern that
starts with `*`: YAML reads it as something else.
"""
_REGEX_TEXT = """\
`regex` holds regular expressions of Python. They match the whole path, so one for the end of a path starts with `.*`.
Looking ahead and behind works. Matching has limited time ([GC008](errors.md#gc008)): repetitions inside of repetitions
may take longer than that, which globs never do.
"""
_LAYERS_TEXT = """\
Layers count from 0 in each stack of repeated layers; in an encoder-decoder model `layers` applies to both stacks unless
the role says `encoder.` or `decoder.`. Slices are those of Python, written as text.
"""
_OVERRIDES = """\
A method with a field `overrides` takes other values for some of its sites. Each override says where it holds, among the
sites that the target selected, and what changes there. The first that matches a site holds, and one that is never used
is an error. Which values can change is on the method's page.
"""
_LIMITS = """\
What exceeds one of these is an error ([GC009](errors.md#gc009)) before anything else is looked at, in a file as in
Python.
"""
_ROLES_TEXT = """\
A role says what a site does in the architecture. Roles are found from the data flow of the graph, not from names;
`graftc roles MODEL` prints those of a model with the evidence for each, and what it could not resolve.
[Coverage](coverage.md) lists how far this works for the architectures of transformers.
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
    """The page."""
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
        ("a file, or a text that is parsed", f"{limits.FILE:,} bytes"),
        ("nesting", f"{limits.DEPTH} levels"),
        ("values, mappings and lists included; what an alias stands for counts each time", f"{limits.VALUES:,}"),
        ("adaptations, and compositions", f"{limits.ADAPTATIONS:,} each"),
        ("tokens to add", f"{limits.TOKENS:,}"),
        ("a text, a key, a pattern", f"{limits.TEXT:,} characters"),
        ("the name of an adaptation or composition", f"{limits.NAME} characters"),
        ("an integer", "63 bits and a sign; of a layer or row 9 digits"),
        ("a rank, width or length", f"{limits.SIZE:,}"),
        ("alternatives of a pattern with braces", f"{BRANCHES:,}; braces {NESTED} deep"),
        (
            "all patterns together, braces expanded, and the counts `{n}` of regular expressions multiplied",
            f"{PATTERNS:,} characters",
        ),
        ("time for matching all regular expressions of a spec", f"{SECONDS:g} s of computing"),
    ]


def _sections() -> list[str]:
    """The models inside of the document, adaptations left out."""
    parts: list[str] = []
    for model in _inner():
        parts += [f"### {model.__name__}\n", prose(getdoc(model) or "") + "\n", field_table(model, _link)]
    return parts


def _inner() -> list[type[BaseModel]]:
    found = nested_models(Spec, skip=MethodSpec)
    return [model for model in found if not issubclass(model, CompositionSpec)] + list(composition_kinds().values())


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
        table(("glob", "matches"), [(code(glob), ", ".join(found) or "none") for glob, found in paths.items()]),
        "### Regular expressions\n",
        _REGEX_TEXT,
        "### Braces in roles\n",
        f"Roles have no wildcards, but braces: {code(brace)} is {' and '.join(map(code, expand_braces(brace)))}.\n",
        "### Layers\n",
        _LAYERS_TEXT,
        f"In a stack of {_DEPTH} layers:\n",
        table(("entry", "layers"), [(entry, ", ".join(map(str, found))) for entry, found in layers.items()]),
        'Several entries stand in a list: `layers: [0, "4:"]`.\n',
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
        f"answers to its full role and to every shorter spelling: a {code(role)} is selected by {spellings}.\n",
    ]
