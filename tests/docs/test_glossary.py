"""The glossary of docs/architecture.md and the code agree."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.places import ROOT

PACKAGE = ROOT / "graftc"
TEXT = (
    (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## Glossary\n")[2].partition("\n## ")[0]
)
TERMS = re.findall(r"^\| `(\w+)` \| (.+) \| `([\w/.]+)` \|$", TEXT, re.MULTILINE)
RETIRED = re.findall(r"^\| `(\w+)` \| ([\w ]+) \|$", TEXT, re.MULTILINE)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def defined(tree: ast.Module) -> set[str]:
    """Return the names that a module itself defines."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def names_in(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a module assigns to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_the_tables_are_read() -> None:
    assert len(TERMS) >= 30 and len(RETIRED) >= 4
    rows = [line for line in TEXT.splitlines() if line.startswith("| `")]
    assert len(rows) == len(TERMS) + len(RETIRED), "every row has one name, its meaning and its file, or what to use"


@pytest.mark.slow
@pytest.mark.sample(
    "WeightSlice-passes/core/weights/weight_slice.py",
    "Site-passes/core/sites/sites.py",
    "OutputObjective-passes/core/method/steering.py",
    "Certificate-records/certificate.py",
    "Artifact-runtime/artifact/read.py",
    "ClozeEncoder-applications/pet/encoding.py",
)
@pytest.mark.parametrize(("term", "path"), [(term, path) for term, _, path in TERMS])
def test_a_term_is_defined_where_the_glossary_says(term: str, path: str) -> None:
    assert (PACKAGE / path).is_file(), f"there is no {path}"
    assert term in defined(TREES[PACKAGE / path])


def test_public_classes_have_names_of_their_own() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.relative_to(PACKAGE).as_posix())
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


@pytest.mark.slow
def test_retired_words_are_no_names() -> None:
    words = {word for word, _ in RETIRED}
    retired = {
        f"{path.relative_to(PACKAGE).as_posix()}: {name}"
        for path, tree in TREES.items()
        for name in [*names_in(tree), path.stem]
        if any(re.search(rf"(^|_){word}($|_)", name) for word in words)
    }
    assert retired == set()


def test_the_tree_on_the_page_is_the_package() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree, parents, shown = page.partition("```\ngraftc/\n")[2].partition("```")[0], [PACKAGE], list[Path]()
    for indent, name in re.findall(r"^( +)(\w+)/", tree, re.MULTILINE):
        del parents[len(indent) // 2 :]
        parents.append(parents[-1] / name)
        shown.append(parents[-1])
    assert len(shown) == len({*shown}) > 60
    assert {*shown} == {path.parent for path in TREES if path.name == "__init__.py"} - {PACKAGE}


def test_every_folder_says_what_lives_there() -> None:
    """Every folder's docstring describes its contents, and no folder has too many files."""
    for path, tree in TREES.items():
        if path.name == "__init__.py" and path.parent != PACKAGE:
            text = ast.get_docstring(tree) or ""
            assert len(text) > 60, f"{path.relative_to(ROOT)} says too little"
    counted = {path.parent for path in TREES}
    many = {folder: len(list(folder.glob("*.py"))) for folder in counted if folder.name != "methods"}
    assert {folder.as_posix(): count for folder, count in many.items() if count > 23} == {}


@pytest.mark.full
def test_files_that_pages_name_are_there() -> None:
    """A path is relative to the root or the package, and a single name is a file anywhere."""
    names = {
        path.name for folder in ("graftc", "tests", "tools", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    }
    missing = set[str]()
    for page in ("docs/architecture.md", "docs/writing-a-method.md", "CONTRIBUTING.md", "README.md"):
        for name in re.findall(r"`([\w/]+\.py)`", (ROOT / page).read_text(encoding="utf-8")):
            there = any((root / name).is_file() for root in (ROOT, PACKAGE)) or ("/" not in name and name in names)
            if not there and "NAME" not in name:
                missing.add(f"{page}: {name}")
    assert missing == set()
