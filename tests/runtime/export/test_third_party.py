"""An exporter in an installed third-party package: one file and one entry point, with graftc unchanged."""

from __future__ import annotations

import ast
import os
import pkgutil
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.cli import completion
from graftc.runtime.export.exporter import LazyFunction
from graftc.runtime.export.registry import exporter_of, exporters, formats
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.support import run_here, run_valid
from tests.kit.folders import adapted_folder, saved_base
from tests.kit.places import ROOT
from tests.kit.plugins import Install, installing

PLUGIN = ROOT / "examples" / "plugin_exporter"
SOURCE = (PLUGIN / "graftc_shapes.py").read_text(encoding="utf-8")
GROUP = "graftc.exporters"
BUILT_IN = ("onnx", "onnx-generate", "onnx-adapter", "pt2", "gguf", "peft")
HEAD = "from graftc.extend import Exporter, ExportOption, GraftError\n"


@pytest.fixture
def install(tmp_path: Path) -> Iterator[Install]:
    folder = tmp_path / "site"
    folder.mkdir()
    with installing(folder) as installed:
        yield lambda name, source, **points: installed(name, source, group=GROUP, **points)


@pytest.fixture
def shapes(install: Install) -> None:
    install("graftc-shapes", SOURCE, shapes="SHAPES")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("third_party")
    adapted_folder(saved_base(folder / "base")).save(folder / "trained")
    return folder


@pytest.fixture
def here(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the artifact and its base, in which commands run."""
    folder = tmp_path / "here"
    shutil.copytree(artifact, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def compiled() -> Any:
    from graftc.testing import tiny

    lora = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
    return graftc.compile({"adapt": [lora]}, tiny("bert").eval()).eval()


def expected(model: Any) -> list[str]:
    """Return the lines for a model, from its Store."""
    store = runner_of(model).store
    every = [(name, tensor) for name, tensor in store.tensors() if name not in store.aliases]
    return sorted(" ".join([name, *map(str, tensor.shape)]) for name, tensor in every)


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_one_file_and_one_line() -> None:
    assert [path.name for path in PLUGIN.glob("**/*.py")] == ["graftc_shapes.py"]
    assert len(SOURCE.splitlines()) <= 30
    assert {line.split()[1] for line in SOURCE.splitlines() if "graftc" in line and "import" in line} == {
        "graftc.extend"
    }
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"] == {GROUP: {"shapes": "graftc_shapes:SHAPES"}}


# --- the command line ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "unmerged"])
def test_the_command(merge: bool, shapes: None, here: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--allow-unchanged"] if merge else ["--no-merge"]
    words = ["trained", "--format", "shapes", "--out", "x.txt", "--option", "order=name", *more]
    data = run_valid(capsys, "export", *words)
    assert (data["format"], data["out"], data["merged"], data["dry_run"]) == ("shapes", "x.txt", merge, False)
    assert (data["tensors"], data["max_rank"]) == ([], None)
    assert data["files"] == [{"path": "x.txt", "bytes": (here / "x.txt").stat().st_size}]
    assert (data["certificate"] is not None) == merge
    loaded = graftc.load(artifact / "trained")
    lines = (here / "x.txt").read_text(encoding="utf-8").splitlines()
    assert lines == expected(loaded.merge(allow_unchanged=True) if merge else loaded)
    assert any(".graftc." in line for line in lines) != merge

    (here / "x.txt").write_text("mine", encoding="utf-8")
    error = run_valid(capsys, "export", *words, status=3)["error"]
    assert error["code"] == "GC063" and (here / "x.txt").read_text(encoding="utf-8") == "mine"
    assert "wrote:" in run_here(capsys, "export", *words, "--force").out
    assert (here / "x.txt").read_text(encoding="utf-8").splitlines() == lines


def test_a_dry_run(shapes: None, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = left(here)
    data = run_valid(capsys, "export", "trained", "-f", "shapes", "--dry-run", "--no-merge")
    assert data["dry_run"] is True and data["out"] is None and data["files"] == [] and left(here) == before


def test_it_is_listed(shapes: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert formats() == (*BUILT_IN, "shapes") and tuple(exporters()) == formats()
    monkeypatch.setenv("COLUMNS", "200")
    assert "onnx|onnx-generate|onnx-adapter|pt2|gguf|peft|shapes" in run_here(capsys, "export", "--help").out
    error = run_valid(capsys, "export", "trained", "-f", "shape", status=2)["error"]
    assert error["code"] == "GC090" and "'shapes'" in error["message"]
    assert dict(completion.formats("")) == {
        **{name: exporter_of(name).summary for name in BUILT_IN},
        "shapes": "of graftc-shapes 1.0",
    }
    assert completion.formats("sh") == [("shapes", "of graftc-shapes 1.0")]


@pytest.mark.parametrize(
    ("words", "code", "said", "hint"),
    [
        (
            ["--option", "colour=red"],
            "GC090",
            "--option colour does not apply to --format shapes",
            "the options are order",
        ),
        (["--option", "oder=name"], "GC090", "--option oder", "did you mean 'order'?"),
        (["--option", "order"], "GC090", "--option order is not valid", "write --option NAME=VALUE"),
        (["--option", "dtype=f16"], "GC090", "--option dtype=f16 is not valid", "write --dtype"),
        (["--option", "order=size"], "GC073", "order is 'size'", "use model or name"),
        (["--dtype", "f16"], "GC090", "--dtype does not apply to --format shapes", "an option of gguf"),
        (
            ["--inputs", "lora"],
            "GC090",
            "--inputs does not apply to --format shapes",
            "an option of onnx, onnx-generate and pt2",
        ),
    ],
)
def test_options_that_it_does_not_take(
    words: list[str], code: str, said: str, hint: str, shapes: None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = left(here)
    error = run_valid(capsys, "export", "trained", "-f", "shapes", "-o", "x.txt", *words, status=2)["error"]
    assert error["code"] == code and said in error["message"] and hint in error["hint"] and left(here) == before


def test_its_options_are_not_those_of_others(shapes: None, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trained", "-f", "onnx", "-o", "x", "--option", "order=name"]
    error = run_valid(capsys, "export", *words, status=2)["error"]
    assert (
        error["message"] == "--option order does not apply to --format onnx" and "an option of shapes" in error["hint"]
    )


@pytest.mark.slow
def test_help_imports_no_plugin(install: Install, tmp_path: Path) -> None:
    """Names are known from metadata, so that help is there whatever a plugin imports, and even if it is broken."""
    install("graftc-heavy", "import torch\nraise ImportError\n", heavy="NOTHING")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from graftc.cli import main; "
        "status = main(['export', '--help']); print({'torch', 'graftc_heavy'} & set(sys.modules)); sys.exit(status)"
    )
    wide = {**os.environ, "COLUMNS": "120"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, env=wide)
    assert "heavy" in done.stdout and done.stdout.splitlines()[-1] == "set()"


# --- Python ----------------------------------------------------------------------------------------------------


def test_python(shapes: None, compiled: Any, tmp_path: Path) -> None:
    merged = compiled.merge(allow_unchanged=True)
    for model, name in ((compiled, "compiled"), (merged, "merged")):
        path = model.export(tmp_path / f"{name}.txt", "shapes", order="name")
        assert path.read_text(encoding="utf-8").splitlines() == expected(model)
    in_order = compiled.export(tmp_path / "order.txt", format="shapes")
    assert sorted(in_order.read_text(encoding="utf-8").splitlines()) == expected(compiled)
    for wrong, words in (({"order": "size"}, "order is 'size'"), ({"colour": "red"}, "has no option colour")):
        with pytest.raises(GraftError, match=words) as caught:
            compiled.export(tmp_path / "x.txt", "shapes", **wrong)
        assert caught.value.code == "GC073" and not (tmp_path / "x.txt").exists()
    with pytest.raises(GraftError, match="'shpes' is unknown") as caught:
        compiled.export(tmp_path / "x.txt", "shpes")
    assert caught.value.hint is not None and caught.value.hint.endswith("; installed packages add shapes")


@pytest.mark.slow
def test_partial_merges(shapes: None, tmp_path: Path) -> None:
    from graftc.testing import tiny

    adapt = [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}, {"method": "prefix", "length": 2}]
    partial = graftc.compile({"adapt": adapt}, tiny("llama").eval()).merge_partially(allow_unchanged=True)
    path = partial.export(tmp_path / "x.txt", "shapes", order="name")
    assert path.read_text(encoding="utf-8").splitlines() == expected(partial.compiled)


FOLDER = """
import graftc
from graftc.extend import Exporter, ExportOption

def prepare(job):
    return [job.graph().outputs, sorted(job.metadata(job.graph())), isinstance(job.model, graftc.Merged)]

def write(job, path):
    path.mkdir()
    (path / "own.txt").write_text(repr([*job.prepared, job.evidence.folded, job.path.name, job.options["digits"]]))
    path.with_name("beside.txt").write_text("beside")

def companions(path, options):
    return ["beside.txt"]

def own(path):
    return (path / "own.txt").is_file()

DIGITS = ExportOption("digits", "Digits behind the point", read=int, default=3)
FOLDER = Exporter("folder", "A folder", (DIGITS,), write, prepare=prepare, replaceable=own, companions=companions)
"""


@pytest.mark.slow
def test_a_folder_and_a_graph(install: Install, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exporter can write a folder, with a file beside it, of a graph; its options may be other than words."""
    install("graftc-folder", FOLDER, folder="FOLDER")
    words = ["trained", "-f", "folder", "-o", "new", "--allow-unchanged"]
    data = run_valid(capsys, "export", *words, "--option", "digits=5")
    assert [file["path"] for file in data["files"]] == ["new/own.txt", "beside.txt"]
    outputs, names, merged, *rest = ast.literal_eval((here / "new" / "own.txt").read_text(encoding="utf-8"))
    assert outputs == ("logits",) and "graftc.certificate" in names and merged is True
    assert rest == [("attention", "inner"), "new", 5]
    error = run_valid(capsys, "export", *words, "--force", "--option", "digits=x", status=2)["error"]
    message = "digits is 'x': invalid literal for int() with base 10: 'x'"
    assert (error["code"], error["message"], error["hint"]) == ("GC073", message, "Digits behind the point")
    assert run_valid(capsys, "export", *words, status=3)["error"]["code"] == "GC063"
    run_valid(capsys, "export", *words, "--force", "--no-merge", status=2)
    words = ["trained", "-f", "folder", "-o", "new", "--force", "--no-merge"]
    run_valid(capsys, "export", *words)
    assert "False, (), 'new', 3" in (here / "new" / "own.txt").read_text(encoding="utf-8")
    (here / "new" / "own.txt").rename(here / "new" / "precious.txt")
    assert run_valid(capsys, "export", *words, status=3)["error"]["code"] == "GC063"


# --- faults ----------------------------------------------------------------------------------------------------

FAULTS = {
    "check": ("check", 'raise GraftError("GC060", "a size is wrong")', "GC060", "a size is wrong"),
    "write": ("write", "path.write_text('half'); 1 / 0", "GC078", "of graftc-other 1.0 failed: ZeroDivisionError"),
    "check fails": ("check", "[][0]", "GC078", "the exporter 'other' of graftc-other 1.0 failed: IndexError"),
    "prepare": ("prepare", "[][0]", "GC078", "the exporter 'other' of graftc-other 1.0 failed: IndexError"),
    "nothing": ("write", "pass", "GC078", "failed: it wrote nothing"),
    "exit": ("write", "raise SystemExit(7)", "GC078", "of graftc-other 1.0 failed: SystemExit"),
    "link": ("write", "path.symlink_to('/etc/hostname')", "GC078", "failed: it wrote neither a file nor a folder"),
    "stray": (
        "write",
        "[path.with_name(name).write_text('text') for name in (path.name, 'stray')]",
        "GC078",
        "failed: it wrote stray beside its file",
    ),
    "disk": ("write", "raise OSError(28, 'No space left on device')", "GC064", "No space left on device"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_an_exporter_that_fails(
    fault: str, install: Install, compiled: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves nothing behind, and what was there stays."""
    where, does, code, words = FAULTS[fault]
    functions = {"prepare": "None", "write": "path.write_text('text')", "check": "None", where: does}
    source = HEAD
    for name, body in functions.items():
        source += f"def {name}(job, path=None):\n    {body}\n"
    source += "OTHER = Exporter('other', 'Text', (), write, check, prepare)\n"
    install("graftc-other", source, other="OTHER")
    before = left(here)
    with pytest.raises(GraftError, match=words) as caught:
        compiled.export(here / "deep" / "x.txt", "other")
    assert caught.value.code == code and left(here) == before
    if code == "GC078":
        place = caught.value.place
        assert place is not None and str(place) == 'entry point other = "graftc_other:OTHER"'
        assert caught.value.hint == "repair or uninstall graftc-other"
    (here / "x.txt").write_text("mine", encoding="utf-8")
    error = run_valid(capsys, "export", "trained", "-f", "other", "-o", "x.txt", "--no-merge", "--force", status=3)[
        "error"
    ]
    assert error["code"] == code and words in error["message"]
    assert (here / "x.txt").read_text(encoding="utf-8") == "mine" and left(here) == sorted([*before, "x.txt"])


BROKEN = {
    "import": ("import nothing_of_this_name", "cannot be imported: ModuleNotFoundError"),
    "exit": ("raise SystemExit(5)", "cannot be imported: SystemExit"),
    "kind": ("OTHER = 5", "registers something of type int as 'other'"),
    "name": ("OTHER = Exporter('another', 'Text', (), print)", "registers the exporter 'another' as 'other'"),
    "option": ("OTHER = Exporter('other', 'Text', ('order',), print)", "something of type Exporter as 'other'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_entry_point(
    fault: str, install: Install, compiled: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is reported when its format is asked for, and no other format suffers."""
    source, words = BROKEN[fault]
    install("graftc-other", f"{HEAD}{source}\n", other="OTHER")
    with pytest.raises(GraftError, match=words) as caught:
        compiled.export(here / "x.txt", "other")
    assert caught.value.code == "GC078" and caught.value.place is not None
    error = run_valid(capsys, "export", "trained", "-f", "other", "-o", "x", status=3)["error"]
    assert error["code"] == "GC078" and words in error["message"]
    assert formats()[-1] == "other" and tuple(exporters()) == BUILT_IN
    error = run_valid(capsys, "export", "trained", "-f", "peft", "--dtype", "f16", "-o", "x", status=2)["error"]
    assert error["hint"] == "leave it out: it is an option of gguf"


def test_tensors_are_copies(install: Install, compiled: Any, tmp_path: Path) -> None:
    """An exporter that writes to the tensors it is given does not change the model."""
    body = "def write(job, path):\n    [t.zero_() for _, t in job.tensors()]\n    path.write_text('text')\n"
    install("graftc-other", f"{HEAD}{body}OTHER = Exporter('other', 'Text', (), write)\n", other="OTHER")
    before = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
    base = {name: tensor.clone() for name, tensor in compiled.compilation.source.state_dict().items()}
    compiled.export(tmp_path / "x.txt", "other")
    for tensors, now in ((before, compiled.state_dict()), (base, compiled.compilation.source.state_dict())):
        assert all(torch.equal(tensor, now[name]) for name, tensor in tensors.items())
    assert any(tensor.any() for tensor in base.values())


def test_a_name_that_is_taken(install: Install, shapes: None, compiled: Any, tmp_path: Path) -> None:
    """Nobody's format is replaced by another one's."""
    install("graftc-other", f"{HEAD}ONNX = Exporter('onnx', 'Text', (), print)\n", onnx="ONNX")
    install("graftc-third", SOURCE, shapes="SHAPES")
    for name, owners in (
        ("onnx", "by graftc and by graftc-other 1.0"),
        ("shapes", "by graftc-shapes 1.0 and by graftc-third 1.0"),
    ):
        with pytest.raises(GraftError, match=f"the format '{name}' is registered twice, {owners}") as caught:
            compiled.export(tmp_path / "x", name)
        assert caught.value.code == "GC078"
    assert tuple(exporters()) == ("onnx-generate", "onnx-adapter", "pt2", "gguf", "peft")


# --- the table of built-in formats -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_functions_that_built_in_formats_name(name: str) -> None:
    for value in vars(exporter_of(name)).values():
        if isinstance(value, LazyFunction):
            assert callable(pkgutil.resolve_name(value.place))
