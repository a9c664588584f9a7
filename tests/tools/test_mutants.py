"""Mutants of graftc's code: the same everywhere, valid, on lines that tests run, and counted by outcome."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from tools.mutants import trial
from tools.mutants.__main__ import EQUIVALENT, main
from tools.mutants.areas import AREAS, ROOT, Area
from tools.mutants.choice import Mutant, chosen_tests, mutants
from tools.mutants.covered import Coverage
from tools.mutants.mutations import Mutation, mutations
from tools.mutants.tree import Tree
from tools.mutants.trial import Outcome, Results

EVERY_KIND = '''"""Text 1 + 1 stays."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    ONLY_FOR_CHECKERS = 1 < 2


def kinds(values: list[int | None], *, end: int = 3) -> int | None:
    """Return 1 + 1 of it."""
    assert end > 0
    total = 0
    for value in values[1:end]:
        if not value:
            continue
        if value == 7 and total > 2:
            break
        total += min(value, end) * 2
        print("a < b")
    if total < 0:
        raise ValueError(f"{total + 1} is less than {0}")
    values.append(divmod(total, 2))
    return total
'''


def covering(path: str, text: str) -> Coverage:
    """Return a coverage in which one test runs every line of a file."""
    coverage = Coverage(seconds={"tests/test_it.py::test": 0.1})
    for line in range(1, text.count("\n") + 1):
        coverage.lines[path][line].add("tests/test_it.py::test")
    return coverage


def changed(kind: str) -> set[tuple[str, str]]:
    """Return the spans of `EVERY_KIND` that one kind changes, before and after."""
    return {(one.old, one.new) for one in mutations(EVERY_KIND) if one.kind == kind}


@pytest.mark.parametrize(
    ("kind", "spans"),
    [
        ("comparison", {("==", "!="), (">", ">="), ("<", "<=")}),
        ("boolean", {("and", "or")}),
        ("negation", {("not value", "(value)"), ("value == 7 and total > 2", "(not (value == 7 and total > 2))")}),
        ("arithmetic", {("*", "/")}),
        ("constant", {("3", "4"), ("0", "1"), ("1", "2"), ("7", "8"), ("2", "3")}),
        ("slice", {("1", "(1) + 1"), ("end", "(end) - 1")}),
        ("loop", {("continue", "break"), ("break", "continue")}),
        ("exchange", {("min", "max")}),
        ("arguments", {("value, end", "end, value"), ("total, 2", "2, total")}),
        ("return", {("return total", "return None")}),
        ("raise", {('raise ValueError(f"{total + 1} is less than {0}")', "pass")}),
        ("statement", {("total += min(value, end) * 2", "pass"), ("values.append(divmod(total, 2))", "pass")}),
    ],
)
def test_each_kind(kind: str, spans: set[tuple[str, str]]) -> None:
    """Text, annotations, assertions, messages and blocks for type checkers stay as they are."""
    assert changed(kind) == spans


def test_changes_are_valid_and_small() -> None:
    """Each change gives another valid file, and says which lines it touches."""
    for one in mutations(EVERY_KIND):
        text = one.applied(EVERY_KIND)
        assert one.compiles(EVERY_KIND) and ast.dump(ast.parse(text)) != ast.dump(ast.parse(EVERY_KIND))
        before, after = one.lines(EVERY_KIND)
        assert before != after and before.splitlines()[0] == EVERY_KIND.splitlines()[one.line - 1].strip()


def test_columns_are_of_characters() -> None:
    """``ast`` counts columns in bytes; text before a change may need more of them than it has characters."""
    (one,) = (one for one in mutations('a = f("×σ") < 1\n') if one.kind == "comparison")
    assert one.applied('a = f("×σ") < 1\n') == 'a = f("×σ") <= 1\n'


def test_keys_follow_the_lines() -> None:
    """A key stays when the function moves, and changes with the line; the same line elsewhere has another."""

    def keys(text: str) -> set[str]:
        return {one.key("a.py", text) for one in mutations(text) if one.kind == "arithmetic"}

    assert keys(EVERY_KIND) == keys("import ast\n\n" + EVERY_KIND)
    assert keys(EVERY_KIND) != keys(EVERY_KIND.replace("total += min", "total -= min"))
    twice = "for a in b:\n    if a:\n        continue\n    if c:\n        continue\n"
    assert len({one.key("a.py", twice) for one in mutations(twice) if one.kind == "loop"}) == 2


def test_the_choice_depends_on_the_seed_alone() -> None:
    """A seed always gives the same mutants, from all areas and of many kinds; a larger count only appends to them."""
    areas = [Area(area.name, tuple(area.files(ROOT)[-3:]), ()) for area in AREAS]
    coverage = Coverage()
    for area in areas:
        for path in area.files(ROOT):
            coverage.lines |= covering(path, (ROOT / path).read_text(encoding="utf-8")).lines

    def places(seed: int, count: int) -> list[tuple[str, int, str, str]]:
        chosen = mutants(ROOT, areas, coverage, seed, count)
        return [(one.path, one.mutation.start, one.mutation.old, one.mutation.new) for one in chosen]

    ten = places(0, 10)
    assert ten == places(0, 20)[:10] and ten != places(1, 10) and len(set(ten)) == 10
    chosen = mutants(ROOT, areas, coverage, 0, 10)
    assert [one.area for one in chosen] == [area.name for area in AREAS] * 2
    assert [one.number for one in chosen] == list(range(10))
    assert all(one.mutation.compiles(one.text) for one in chosen)


def test_only_lines_that_tests_run(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(EVERY_KIND, encoding="utf-8")
    coverage = Coverage()
    coverage.lines["a.py"][18].add("tests/test_it.py::test")
    drawn = mutants(tmp_path, [Area("all", ("*.py",), ())], coverage, 0, 1000)
    assert {one.mutation.line for one in drawn} == {18} and len(drawn) > 3


def test_tests_that_run_the_line_come_first() -> None:
    """Then come their neighbours, which may share what these have made, and then the area's other tests."""
    mutation = Mutation("constant", "", 1, 0, 1, "1", "2")
    mutant = Mutant(0, "all", "a.py", mutation, "1\n")
    long, short, near, far = "t/test_l.py::a", "t/test_s.py::a", "t/test_s.py::b", "t/test_f.py::a"
    coverage = Coverage(seconds={far: 1.0, long: 5.0, near: 1.0, short: 1.0, "u/test_u.py::a": 1.0})
    coverage.lines["a.py"][1] = {long, short}
    files = ["t/test_f.py", "t/test_l.py", "t/test_s.py"]
    assert [test for test, _ in chosen_tests(mutant, coverage, files, 100)] == [short, long, near, far]
    assert [test for test, _ in chosen_tests(mutant, coverage, files, 3)] == [short, near, far]


def test_a_changed_copy_is_restored(tmp_path: Path) -> None:
    """The folder itself stays as it is, and so does the copy after an error."""
    (tmp_path / "a.py").write_text("A = 1\n", encoding="utf-8")
    tree = Tree(tmp_path, tmp_path / "build" / "tree")
    tree.update()
    with pytest.raises(ZeroDivisionError), tree.changed("a.py", "A = 2\n"):
        assert (tree.folder / "a.py").read_text(encoding="utf-8") == "A = 2\n"
        assert (tmp_path / "a.py").read_text(encoding="utf-8") == "A = 1\n"
        raise ZeroDivisionError
    assert (tree.folder / "a.py").read_text(encoding="utf-8") == "A = 1\n"
    (tmp_path / "a.py").unlink()
    tree.update()
    assert not (tree.folder / "a.py").exists()


def test_results_survive_a_line_that_was_cut_off(tmp_path: Path) -> None:
    results = Results(tmp_path / "results.jsonl")
    mutant = Mutant(0, "all", "a.py", Mutation("constant", "", 1, 0, 1, "1", "2"), "1\n")
    first, second = (Outcome(name, "caught", "t::a", 1.0, 1) for name in ("first", "second"))
    results.add(mutant, first)
    with results.path.open("a", encoding="utf-8") as file:
        file.write('{"key": "cut o')
    results.add(mutant, second)
    assert results.read() == {"first": first, "second": second}


SOURCE = """def noticed(a: int) -> int:
    return a * 2


def unnoticed(a: int) -> bool:
    return a < 5
"""
TESTS = """import tiny

def test_noticed():
    assert tiny.noticed(2) == 4

def test_unnoticed():
    assert tiny.unnoticed(1) is True
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Return a folder with a module of two functions and their tests."""
    (tmp_path / "tiny.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_tiny.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n', encoding="utf-8")
    (tmp_path / "equivalent.json").write_text("{}", encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_tiny_package(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Mutants are caught or survive as they should, a killed run is resumed, and arguments count."""
    area, equivalent = Area("all", ("tiny.py",), ("tests",)), tiny / "equivalent.json"

    def run(*arguments: str) -> str:
        main(list(arguments), tiny, [area], equivalent)
        return capsys.readouterr().out

    assert "measuring" in run("--count", "1")
    path = tiny / "build" / "mutants" / "results.jsonl"
    (first,) = path.read_text(encoding="utf-8").splitlines()
    path.write_text(f"{first}\n{first[:20]}", encoding="utf-8")
    output = run("--count", "100")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    outcomes = {(line["before"], line["after"]): (line["outcome"], line["test"]) for line in lines}
    assert len(outcomes) == len(lines) > 4 and json.loads(first) == lines[0]
    assert outcomes["return a * 2", "return a * 3"] == ("caught", "tests/test_tiny.py::test_noticed")
    assert outcomes["return a < 5", "return None"] == ("caught", "tests/test_tiny.py::test_unnoticed")
    assert outcomes["return a < 5", "return a <= 5"] == ("survived", "")
    assert "+ return a <= 5" in output and "measuring" not in output
    assert (tiny / "tiny.py").read_text(encoding="utf-8") == SOURCE
    survivors = {line["key"].partition(".")[0] for line in lines if line["outcome"] == "survived"}
    equivalent.write_text(json.dumps({key: {"because": "nobody asks"} for key in survivors}), encoding="utf-8")
    assert "survived, key" not in run("--count", "100", "--table")


@pytest.mark.slow
def test_an_endless_loop_is_a_timeout(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that was measured, and takes many times as long, has noticed; one that was not reached has not."""
    monkeypatch.setattr(trial, "LONG", 0.2)
    tree = Tree(tiny, tiny / "build" / "tree")
    tree.update()
    mutation = Mutation("return", "noticed", 2, SOURCE.index("return"), SOURCE.index("\n\n"), "", "while True: pass")
    mutant = Mutant(0, "all", "tiny.py", mutation, SOURCE)
    test = "tests/test_tiny.py::test_noticed"
    outcome = trial.tried(tree, mutant, [(test, 0.01)], limit=1.5)
    assert (outcome.outcome, outcome.test) == ("timeout", test) and outcome.caught
    assert trial.failing_without(tree, [(test, 0.01)]) == ""
    assert trial.tried(tree, mutant, [(test, 100.0)], limit=1.5).outcome == "survived"


def test_arguments_are_about_lines_that_exist() -> None:
    """An argument for an equivalent mutant goes when its line does."""
    arguments = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    texts: dict[str, str] = {}
    for key, of in arguments.items():
        text = texts.setdefault(of["path"], (ROOT / of["path"]).read_text(encoding="utf-8"))
        assert key in {one.key(of["path"], text) for one in mutations(text)}, f"{key}: {of['before']}"
        assert len(of["because"]) > 40
