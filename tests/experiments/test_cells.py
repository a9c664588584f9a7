"""The digests of cells depend on what the figures depend on; interrupted runs end with the bytes of others."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import cells
from experiments.cells import Cell, Part, Sources, code_digest, code_of, data_digest, modules_of, sources_of
from experiments.running import run
from experiments.store import Record, Store, StoreError, record_of, sealed
from tests.experiments.fakes import COUNT, POINTS, fixed, nothing, part
from tests.kit.places import ROOT

CELL = Cell("fake", "row", "one", "none", "float32", 0.1, 0, 1, {"rank": 8})
SOURCES = Sources("c", "d", {"graftc": "1", "torch": "2"})
DIGEST = "94efa8cd42ff5397df9a6b0e047bd13ed4737357f88219ee7ed4c0f946e2a95f"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with a part, a helper, two methods and a base."""
    monkeypatch.setattr(cells, "ROOT", tmp_path)
    modules = {
        "work/part.py": "from work.helper import x\nif TYPE_CHECKING:\n    from work.machine import y\n",
        "work/helper.py": "x = 1\n",
        "work/machine.py": "y = 1\n",
        "graftc/specs/methods/one.py": "from graftc.specs.methods.two import A\nfrom graftc.specs.base import B\n",
        "graftc/specs/methods/two.py": "A = 1\n",
        "graftc/specs/methods/other.py": "O = 1\n",
        "graftc/specs/base.py": "B = 1\n",
        "graftc/passes/methods/one.py": "def f():\n    from graftc.passes.methods import late\n",
        "graftc/passes/methods/late.py": "L = 1\n",
    }
    for name, text in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    modules_of.cache_clear()
    return tmp_path


def test_the_code_is_the_parts_and_the_methods(tree: Path) -> None:
    """Imports are followed in the part's package and among methods, except those for type checkers."""
    assert modules_of("work.part", "one") == (
        *("graftc.passes.methods.late", "graftc.passes.methods.one"),
        *("graftc.specs.methods.one", "graftc.specs.methods.two"),
        *("work.helper", "work.part"),
    )


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        *((name, True) for name in ("work/helper.py", "graftc/specs/methods/two.py", "graftc/passes/methods/late.py")),
        *((name, False) for name in ("work/machine.py", "graftc/specs/methods/other.py", "graftc/specs/base.py")),
    ],
)
def test_a_change_of_code_changes_the_digest(tree: Path, file: str, changes: bool) -> None:
    fake = Part("fake", "work.part:figures", "work.part:files", fixed(()))
    before = code_digest(fake, CELL)
    with (tree / file).open("a", encoding="utf-8") as source:
        source.write("more = 2\n")
    assert (code_digest(fake, CELL) != before) == changes


def test_comments_and_docstrings_are_no_code() -> None:
    plain = 'def f(x: int = 1) -> str:\n    return "# no comment"\n\n\nclass A:\n    field: int = 1\n'
    described = (
        '"""A module."""\n\n# About f.\ndef f(x: int = 1) -> str:  # here\n    """Return\n\n    a text."""\n'
        '    return "# no comment"\n\n\nclass A:\n    field: int = 1\n    """A field."""\n'
    )
    assert code_of(described) == code_of(plain)
    assert code_of(plain.replace("= 1", "= 2")) != code_of(plain)


def test_the_digest_depends_on_everything_else(tmp_path: Path) -> None:
    """Each field of the cell, its settings, the data and the versions change it; nothing else does."""
    digest = SOURCES.digest(CELL)
    assert digest == DIGEST
    others = [
        *(SOURCES.digest(replace(CELL, **{name: 9})) for name in ("seed", "steps", "rate", "dtype", "model", "name")),
        SOURCES.digest(replace(CELL, settings={"rank": 4})),
        *(replace(SOURCES, **{name: "x"}).digest(CELL) for name in ("code", "data")),
        replace(SOURCES, versions={"graftc": "1", "torch": "3"}).digest(CELL),
    ]
    assert len({digest, *others}) == 1 + len(others)
    paths = tmp_path / "a" / "model", tmp_path / "b" / "model"
    for path, text in zip(paths, ("1", "2"), strict=True):
        path.parent.mkdir()
        path.write_text(text)
    assert data_digest(paths[:1]) != data_digest(paths[1:])


def finished(folder: Path) -> bytes:
    """Return the bytes of the part's file after a run that nothing interrupts."""
    assert run(part(), folder=folder) == 0
    return (folder / "fake.jsonl").read_bytes()


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(tmp_path: Path) -> None:
    """Wherever a run is killed, the next one computes what is missing and no more."""
    expected = finished(tmp_path / "whole")
    assert expected.count(b"\n") == COUNT
    command = [sys.executable, "-m", "tests.experiments.fakes"]
    folders = {point: tmp_path / point for point in POINTS}
    running = [subprocess.Popen([*command, str(folders[point]), point], cwd=ROOT) for point in POINTS]
    assert {process.wait(60) for process in running} == {-signal.SIGKILL}
    complete = {"first": 0, "middle": 3, "last": 5, "half a line": 3, "before the rename": 6}
    for point, folder in folders.items():
        own = folder / "fake.jsonl"
        lines = own.read_bytes().splitlines(keepends=True) if own.exists() else []
        assert len([line for line in lines if line.endswith(b"\n")]) == complete[point], point
        assert (len(lines) > complete[point]) == (point == "half a line")
        assert finished(folder) == expected, point
        assert len((folder / "fake.times.jsonl").read_bytes().splitlines()) == COUNT


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(tmp_path: Path) -> None:
    expected = finished(tmp_path / "one")
    assert run(part(), jobs=2, folder=tmp_path / "two") == 0
    assert (tmp_path / "two" / "fake.jsonl").read_bytes() == expected


@pytest.mark.slow
def test_processes_of_a_killed_run_end(tmp_path: Path) -> None:
    """They do not go on computing cells that nobody stores."""
    command = [sys.executable, "-m", "tests.experiments.fakes", str(tmp_path / "cells"), "waiting"]
    running = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "GRAFTC_TESTS_WAIT": str(tmp_path)})
    workers: list[int] = []
    for _ in until(60):
        workers = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
        if len(workers) == 2:
            break
    assert len(workers) == 2
    running.kill()
    running.wait()
    for _ in until(30):
        if not any(is_alive(number) for number in workers):
            return
    pytest.fail(f"{workers} are still running")


def until(seconds: float) -> Iterator[None]:
    """Yield every tenth of a second, for a number of seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.1)


def is_alive(number: int) -> bool:
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def names_in(folder: Path) -> list[str]:
    return [record.cell.name for record in Store("fake", folder).records().values()]


def test_cells_that_are_not_planned_stay_unless_they_are_pruned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run with other settings, such as the quick ones, in the folder of long runs must not delete these."""
    finished(tmp_path)
    assert run(part(4), only="fake/none/float32/1/", folder=tmp_path) == 0
    assert names_in(tmp_path) == ["0", "1", "2", "3", "4", "5"]
    assert "2 other cells are stored too; --prune drops them" in capsys.readouterr().err
    assert run(part(4), folder=tmp_path, prune=True) == 0
    assert names_in(tmp_path) == ["0", "1", "2", "3"]


def test_stale_cells_stay_until_they_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for some cells after a change of the code drops nothing of the others."""
    finished(tmp_path)
    monkeypatch.setattr("experiments.cells.code_digest", lambda *_: "another")
    assert run(part(), only="fake/none/float32/1/", folder=tmp_path) == 0
    assert names_in(tmp_path) == [str(number) for number in range(COUNT)]
    codes = [record.sources.code for record in Store("fake", tmp_path).records().values()]
    assert [number for number, code in enumerate(codes) if code == "another"] == [1]
    assert len(Store("fake", tmp_path).times_of()) == COUNT


def test_a_cell_that_fails_does_not_stop_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = part()
    first, *others = fake.plan(nothing)
    wrong = replace(fake, plan=fixed((replace(first, name="no number"), *others)))
    assert run(wrong, folder=tmp_path) == 1
    assert len(Store("fake", tmp_path).records()) == COUNT - 1


def test_damaged_lines_are_refused(tmp_path: Path) -> None:
    """A line whose content does not have its checksum, or its digest, was written by hand."""
    record = Record(CELL, SOURCES, {"value": 1.5})
    assert record_of(record.line()) == record
    content = json.loads(record.line())
    for changed in ({"data": "other"}, {"figures": {"value": 1.25}}, {"figures": {"value": math.nan}}, {"check": 1}):
        with pytest.raises(ValueError, match="checksum"):
            record_of(json.dumps({**content, **changed}))
    del content["check"]
    with pytest.raises(ValueError, match="does not have the digest"):
        record_of(sealed({**content, "data": "other"}))
    with pytest.raises(ValueError, match="not a record"):
        record_of(sealed({}))


@pytest.mark.parametrize("damage", [b"{\n", b"[]\n", b"\xff\n", b"\n", b"{}\n"])
def test_a_damaged_file_is_named_with_its_line(damage: bytes, tmp_path: Path) -> None:
    finished(tmp_path)
    for name in ("fake.jsonl", "fake.times.jsonl"):
        path = tmp_path / name
        own = path.read_bytes()
        first, *rest = own.splitlines(keepends=True)
        path.write_bytes(b"".join([first, damage, *rest]))
        with pytest.raises(StoreError, match=re.escape(f"{path}:2: ")):
            run(part(), folder=tmp_path)
        path.write_bytes(own)


def test_a_file_of_another_part_is_refused(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "fake.jsonl").rename(tmp_path / "parity.jsonl")
    with pytest.raises(StoreError, match=r"parity\.jsonl:1: fake/none/float32/0/\S* is a cell of another part"):
        Store("parity", tmp_path).records()


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "fake.jsonl").mkdir()
    with pytest.raises(StoreError, match=r"fake\.jsonl: Is a directory"):
        Store("fake", tmp_path).records()


def test_the_sources_of_a_real_method_are_its_modules() -> None:
    """LoRA's cells depend on its spec and its pass, and not on DoRA's."""
    modules = modules_of("experiments.parity", "lora")
    assert {"experiments.parity", "experiments.sources", "graftc.specs.methods.lora"} <= set(modules)
    assert "graftc.passes.methods.lora" in modules and "graftc.passes.methods.dora" not in modules
    assert not {"experiments.cells", "experiments.store", "experiments.page"} & set(modules)
    assert sources_of(part(), part().plan(nothing)[0]).versions["torch"]
