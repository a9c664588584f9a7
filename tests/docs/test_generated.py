"""Generated pages are up to date with the code, and the catalogue of codes lists exactly those that the code uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from graftc.specs.claims import FoldKind
from graftc.specs.errors.catalogue import CATALOGUE
from graftc.specs.registry import method_specs
from tools.docs.__main__ import main
from tools.docs.blocks import DOCS, ROOT
from tools.docs.cli import commands, render_cli
from tools.docs.errors import examples
from tools.docs.methods import built_in
from tools.docs.pages import render_all, stale_pages, write_pages


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return render_all()


@pytest.mark.slow
def test_pages_are_up_to_date(pages: dict[str, str]) -> None:
    assert stale_pages(pages, DOCS) == [], "run `make docs`"


@pytest.mark.slow
def test_pages_say_what_makes_them(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        # JSON has no comments, and of the page on serving only the tables are made.
        if not name.endswith((".json", "serving.md")):
            assert text.startswith("<!-- Made by `make docs` (python -m tools.docs)")


@pytest.mark.full
def test_stale_and_left_over_pages_are_named(
    pages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--check", "--docs", str(tmp_path)]) == 1
    assert str(tmp_path / "spec.md") in capsys.readouterr().err
    assert write_pages(pages, tmp_path) == sorted(pages)
    assert write_pages(pages, tmp_path) == []
    (tmp_path / "methods" / "gone.md").write_text("# gone\n")
    (tmp_path / "cli.md").write_text("")
    assert stale_pages(pages, tmp_path) == ["cli.md", "methods/gone.md"]
    assert main(["--docs", str(tmp_path)]) == 0
    assert not (tmp_path / "methods" / "gone.md").exists()
    assert main(["--check", "--docs", str(tmp_path)]) == 0


def test_every_method_has_a_page(pages: dict[str, str]) -> None:
    for entry in built_in():
        page = pages[f"methods/{entry.tag}.md"]
        assert all(f"| `{field}` |" in page for field in entry.spec_class.model_fields if field not in
                   ("name", "method", "target", "dtype"))  # fmt: skip
        assert f"]({entry.tag}.md)" in pages["methods/index.md"]
        assert entry.claims.folds in FoldKind
    assert {entry.tag for entry in built_in()} <= method_specs().keys()


def test_every_command_has_a_section() -> None:
    page = render_cli()
    for name, command in commands().items():
        assert f"## graftc {name}\n" in page
        for parameter in command.params:
            assert parameter.hidden or parameter.help, f"graftc {name}: {parameter.name} has no help"


# --- the catalogue ---------------------------------------------------------------------------------------


def used_codes() -> Iterator[tuple[str, str, str]]:
    """Yield each use of a code in graftc outside the catalogue: the code, ``raise`` or ``warn``, and its location."""
    for path in sorted((ROOT / "graftc").rglob("*.py")):
        if path.name == "catalogue.py" or "testing" in path.parts:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compared = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Compare) for inner in ast.walk(node)}
        warned = {
            id(node.args[0])
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "warn"
            and node.args
        }  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"GC\d{3}", node.value):
                if id(node) in compared:
                    continue
                kind = "warn" if id(node) in warned else "raise"
                yield node.value, kind, f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.full
def test_every_code_that_is_used_is_in_the_catalogue() -> None:
    assert [use for use in used_codes() if use[0] not in CATALOGUE] == []


@pytest.mark.full
def test_every_code_of_the_catalogue_is_used() -> None:
    assert sorted(CATALOGUE.keys() - {code for code, _, _ in used_codes()}) == []


@pytest.mark.full
def test_warnings_are_warned_and_errors_raised() -> None:
    wanted = {"warning": "warn", "error": "raise"}
    uses = [use for use in used_codes() if use[0] in CATALOGUE]
    assert [use for use in uses if use[1] != wanted[CATALOGUE[use[0]].severity]] == []


def test_every_code_is_explained() -> None:
    assert list(CATALOGUE) == sorted(CATALOGUE)
    for code in CATALOGUE.values():
        assert code.title[0].islower() and not code.title.endswith(".")
        assert code.explanation.endswith(".") and code.remedy.endswith(".")
        assert code.remedy.count(". ") <= 1, f"{code.code}: a remedy is one or two sentences"
        assert (code.severity == "warning") == (code.exit_code == 0)


def test_every_code_has_a_stable_anchor(pages: dict[str, str]) -> None:
    for code in CATALOGUE.values():
        assert f"### {code.code}: {code.title} {{#{code.code.lower()}}}\n" in pages["errors.md"]


def test_examples_are_of_their_code() -> None:
    by_code = examples(ROOT)
    assert len(by_code) >= 20
    for code, example in by_code.items():
        assert re.match(rf"(warning )?{code}: ", example.output)
        assert (CATALOGUE[code].severity == "warning") == example.output.startswith("warning ")
