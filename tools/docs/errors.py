"""docs/errors.md: every code of the catalogue, with an example if there is one among the golden texts of the tests.

Examples are texts that the tests compare graftc's output with: the golden texts of specs (``tests/golden/errors``), of
commands (``tests/golden/cli``), and of calls (``tests/docs/golden``). Those that need only a spec are run again here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from graftc.specs.errors.catalogue import CATALOGUE, Code
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import parse_spec
from tools.docs.markdown import fence, header, table

__all__ = ["Example", "examples", "render_errors"]

_GROUPS = (
    ("GC00", "Reading a spec"),
    ("GC01", "Sites of a model"),
    ("GC02", "Specs that do not fit the model"),
    ("GC03", "Capturing and running a model"),
    ("GC04", "Rewriting"),
    ("GC05", "Folding and adapter tensors"),
    ("GC06", "Files and packages"),
    ("GC07", "Methods and plugins"),
    ("GC08", "Artifacts"),
    ("GC09", "The command line, and inspecting graphs"),
    ("GC10", "Checkpoints as files, and merging"),
    ("GC11", "Checkpoints of PEFT"),
    ("GC12", "Training loops"),
    ("GC13", "Several processes"),
    ("GC14", "Generating"),
    ("GC15", "Memory of training"),
    ("GC16", "Quantised bases"),
    ("GC17", "Patterns and verbalizers"),
    ("GC18", "Data and members of PET"),
    ("GC19", "Adapters that come and go"),
    ("GC20", "TRL's command line"),
)
_INTRO = """\
Every failure that a spec, a model or a file can cause has a stable code. An error aborts the operation and determines
the exit status of the command; in Python it is a `graftc.GraftError` with `code`, `message`, `place`, `hint` and
`exit_code`, and `to_json()` returns all of these as data. A warning is a `graftc.GraftWarning`, and the operation
continues.
"""
_STATUS = {
    0: "none, the operation continues",
    1: "1, negative result",
    2: "2, the command line or the spec is wrong",
    3: "3, a file or the model failed",
}
_LINKS = {
    "page on PEFT checkpoints": "[page on PEFT checkpoints](peft.md)",
    "spec reference": "[spec reference](spec.md)",
    "`graftc roles MODEL`": "[`graftc roles MODEL`](cli.md#graftc-roles)",
}
_FAVOURITES = {
    "GC001": "glob_without_quotes",
    "GC002": "wrong_choice",
    "GC003": "unknown_field",
    "GC011": "brace_branch_without_match",
    "GC012": "unknown_role",
    "GC015": "role_in_some_layers",
    "GC022": "tied_weight_fold",
}
"""The examples to show for codes with several; the default is the first by name, those with a spec before others."""


@dataclass(frozen=True)
class Example:
    """One example: its name, the printed output, and the wrong spec, if the error is in a spec."""

    name: str
    output: str
    spec: str | None = None


def render_errors(root: Path) -> str:
    """Return the text of the page.

    Args:
        root: the repository, which contains the golden texts.
    """
    by_code = examples(root)
    parts = [header("Errors and warnings"), _INTRO]
    rows = [(f"[{c.code}](#{c.code.lower()})", c.title, c.severity, str(c.exit_code)) for c in CATALOGUE.values()]
    parts.append(table(("code", "title", "kind", "exit status"), rows))
    for start, title in _GROUPS:
        codes = [entry for entry in CATALOGUE.values() if entry.code.startswith(start)]
        if codes:
            parts += [f"## {title}\n", *(_section(entry, by_code.get(entry.code)) for entry in codes)]
    return "\n".join(parts)


def _section(found: Code, example: Example | None) -> str:
    kind = found.severity.capitalize()
    parts = [
        f"### {found.code}: {found.title} {{#{found.code.lower()}}}\n",
        f"{_linked(found.explanation)}\n",
        f"**What to do.** {_linked(found.remedy)}\n",
        f"{kind}. Exit status: {_STATUS[found.exit_code]}.\n",
    ]
    if example is not None:
        if example.spec is not None:
            parts.append(fence(example.spec, 'yaml title="spec.yaml"'))
        parts.append(fence(example.output, "text"))
    return "\n".join(parts)


def _linked(text: str) -> str:
    for words, link in _LINKS.items():
        text = text.replace(words, link)
    return text


def examples(root: Path) -> dict[str, Example]:
    """Return one example for each code that has any."""
    by_code: dict[str, list[Example]] = {}
    for example in [*_with_specs(root / "tests" / "golden" / "errors"), *_outputs(root)]:
        match = re.match(r"(?:warning )?(GC\d{3}): ", example.output)
        if match is not None:
            by_code.setdefault(match[1], []).append(example)
    return {number: _best(number, choice) for number, choice in sorted(by_code.items())}


def _best(number: str, choice: list[Example]) -> Example:
    liked = [example for example in choice if example.name == _FAVOURITES.get(number)]
    return (liked or choice)[0]


def _with_specs(folder: Path) -> Iterable[Example]:
    """Yield examples from golden texts that consist of a spec, a line of equal signs, and the output."""
    for path in sorted(folder.glob("*.txt")):
        spec, marks, output = path.read_text(encoding="utf-8").partition("\n=====\n")
        if marks:
            yield Example(path.stem, _run(spec) or output, spec)


def _run(spec: str) -> str | None:
    """Return the error that the spec raises by itself; None if it takes a model to find it wrong."""
    try:
        parse_spec(spec, file="spec.yaml")
    except GraftError as error:
        return str(error)
    return None


def _outputs(root: Path) -> Iterable[Example]:
    """Yield examples from golden texts that contain only the output."""
    for folder in ("tests/golden/cli/errors", "tests/golden/cli", "tests/docs/golden"):
        for path in sorted((root / folder).rglob("*.txt")):
            yield Example(path.stem, path.read_text(encoding="utf-8").strip())
