"""Damaged and hostile artifacts are refused with their own code before any part of them is used."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftc
from graftc.runtime.artifact import open_artifact
from graftc.runtime.artifact.write import file_digest
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.support import run_here
from tests.kit.folders import saved_artifact, tree_bytes
from tests.kit.refusals import refused
from tests.runtime.artifact.support import edit_manifest

FLIPS = 25


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corrupt")
    return saved_artifact(folder)


@pytest.fixture
def artifact(intact: Path, tmp_path: Path) -> Path:
    """A copy to damage, beside a copy of its base."""
    shutil.copytree(intact.parent / "base", tmp_path / "base")
    shutil.copytree(intact, tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture(autouse=True)
def _nothing_is_used(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail if a model is loaded, a spec read or a graph built from a refused artifact, unless a test allows it."""
    if "may_be_used" in request.fixturenames:
        return
    request.getfixturevalue("intact")

    def used(*_: object, **__: object) -> Any:
        raise AssertionError("a damaged artifact was used")

    for name in (
        "artifact.read.parse_spec",
        "artifact.read.program_from_json",
        "loading.load.compile_model",
        "loading.load.find_base",
    ):
        monkeypatch.setattr(f"graftc.runtime.{name}", used)


@pytest.fixture
def may_be_used() -> None:
    """Allow the command of this test to open what it can before it answers."""


def code_of(path: Path) -> str:
    error = refused(graftc.load, path)
    assert error.exit_code == 3 and str(path) in error.message
    return error.code


FILES = (
    "manifest.json",
    "spec.yaml",
    "adapters.safetensors",
    "certificates/fold.json",
    *(f"programs/0.{kind}.json" for kind in ("base.train", "base.eval", "train", "eval")),
)


@pytest.mark.slow
def test_these_are_all_files(intact: Path) -> None:
    assert set(tree_bytes(intact)) == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit(name: str, artifact: Path) -> None:
    """A flipped bit is detected at random places, including the first and the last byte."""
    file, rng = artifact / name, random.Random(name)
    content = file.read_bytes()
    places = [0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(FLIPS))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(damaged))
        # In a manifest the bit may be in the field that states its kind, or in a name.
        assert code_of(artifact) in ({"GC080", "GC081", "GC082", "GC085"} if name == "manifest.json" else {"GC082"})
    file.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0.0, 0.5, 0.999])
def test_truncated(name: str, left: float, artifact: Path) -> None:
    content = (artifact / name).read_bytes()
    (artifact / name).write_bytes(content[: int(len(content) * left)])
    assert code_of(artifact) == "GC082"


@pytest.mark.parametrize("name", FILES)
def test_missing(name: str, artifact: Path) -> None:
    (artifact / name).unlink()
    assert code_of(artifact) == ("GC080" if name == "manifest.json" else "GC083")


@pytest.mark.slow
def test_a_file_too_many(artifact: Path) -> None:
    (artifact / "programs" / "more.py").write_text("print('hello')")
    assert code_of(artifact) == "GC085"


def test_no_artifact(tmp_path: Path) -> None:
    assert code_of(tmp_path / "nothing") == "GC080"
    (tmp_path / "file").touch()
    assert code_of(tmp_path / "file") == "GC080"
    (tmp_path / "manifest.json").write_text('{"name": "somebody else\'s"}')
    assert code_of(tmp_path) == "GC080"


@pytest.mark.parametrize("version", [2, 99])
def test_a_newer_format(version: int, artifact: Path) -> None:
    edit_manifest(artifact, schema_version=version)
    assert code_of(artifact) == "GC081"
    with pytest.raises(GraftError, match=f"format {version}, but this release reads only up to 1") as caught:
        open_artifact(artifact)
    assert "upgrade" in (caught.value.hint or "")


# --- tensors: the file's own digest is recomputed, as an attacker would do -------------------------------------


def _mend(artifact: Path, name: str = "adapters.safetensors") -> None:
    file = artifact / name
    entry = {"bytes": file.stat().st_size, "sha256": file_digest(file)}
    edit_manifest(artifact, files=lambda files: {**files, name: entry})


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], artifact: Path) -> None:
    save_file(change(load_file(artifact / "adapters.safetensors")), artifact / "adapters.safetensors")
    _mend(artifact)


def _swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    one, two = [name for name in tensors if name.endswith("query.graftc.attention.A")]
    return {**tensors, one: tensors[two], two: tensors[one]}


def _first(tensors: dict[str, torch.Tensor], value: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    name = sorted(tensors)[0]
    return {**tensors, name: value(tensors[name])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_swap, "has values that do not match"),
        (lambda t: _first(t, lambda x: x + 1), "has values that do not match"),
        (lambda t: _first(t, lambda x: x.t().contiguous()), "a dtype or shape other than"),
        (lambda t: _first(t, lambda x: x.to(torch.bfloat16)), "a dtype or shape other than"),
        (lambda t: {**t, "more": torch.ones(2)}, "differ from the listed ones: more"),
        (lambda t: dict(sorted(t.items())[1:]), "differ from the listed ones"),
    ],
    ids=["swapped", "values", "shape", "dtype", "one more", "one less"],
)
def test_tensors_of_others(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], words: str, artifact: Path
) -> None:
    _tensors(change, artifact)
    with pytest.raises(GraftError, match=words) as caught:
        open_artifact(artifact).tensors()
    assert caught.value.code == "GC084"


def test_a_safetensors_file_that_is_none(artifact: Path) -> None:
    (artifact / "adapters.safetensors").write_bytes(b"\xff" * 64)
    _mend(artifact)
    with pytest.raises(GraftError) as caught:
        open_artifact(artifact).tensors()
    assert caught.value.code == "GC082"


# --- names and links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../base/config.json", "/etc/passwd", "a/../../b", "a//b", ".hidden", "a\\b", "é"])
def test_a_file_name_that_leads_elsewhere(name: str, artifact: Path) -> None:
    edit_manifest(artifact, files=lambda files: {**files, name: files["spec.yaml"]})
    assert code_of(artifact) == "GC085"


@pytest.mark.parametrize("name", ["../x", "", "a..b", "a\nb", "a\u202eb", "x" * 5000])
def test_a_tensor_name_that_is_none(name: str, artifact: Path) -> None:
    edit_manifest(artifact, adapters=lambda adapters: {**adapters, name: next(iter(adapters.values()))})
    assert code_of(artifact) == "GC085"


@pytest.mark.parametrize("name", ["spec.yaml", "adapters.safetensors", "programs", "certificates"])
def test_a_link(name: str, artifact: Path, tmp_path: Path) -> None:
    """A link is refused even if its target has the right contents, which may change between checking and reading."""
    (artifact / name).rename(tmp_path / "away")
    (artifact / name).symlink_to(tmp_path / "away")
    assert code_of(artifact) == "GC085"


def test_a_linked_manifest(artifact: Path, tmp_path: Path) -> None:
    (artifact / "manifest.json").rename(tmp_path / "away")
    (artifact / "manifest.json").symlink_to(tmp_path / "away")
    assert code_of(artifact) == "GC085"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe(artifact: Path) -> None:
    (artifact / "spec.yaml").unlink()
    os.mkfifo(artifact / "spec.yaml")
    assert code_of(artifact) == "GC085"


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"artifact": "graftc", "artifact": "graftc"}',
        '{"artifact": "graftc", "schema_version": NaN}',
        "1",
    ],
    ids=["deep", "twice", "nan", "number"],
)
def test_a_manifest_that_is_none(text: str, artifact: Path) -> None:
    (artifact / "manifest.json").write_text(text)
    assert code_of(artifact) in ("GC080", "GC082")


def test_fields_of_a_manifest(artifact: Path) -> None:
    """A sealed manifest of the wrong form is refused."""
    for field, value in (("seed", "zero"), ("sites", [{}]), ("files", {"spec.yaml": {"bytes": -1, "sha256": ""}})):
        before = (artifact / "manifest.json").read_bytes()
        edit_manifest(artifact, **{field: value})
        assert code_of(artifact) == "GC082"
        (artifact / "manifest.json").write_bytes(before)


# --- on the command line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "merge", "export"])
def test_commands_refuse_it(command: str, artifact: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (artifact / "spec.yaml").write_text("version: 1\n")
    more = {"merge": ["--out", str(tmp_path / "out")], "export": ["-f", "onnx", "--out", str(tmp_path / "out")]}
    outcome = run_here(capsys, command, str(artifact), *more.get(command, []), "--json")
    assert outcome.status == 3 and outcome.data["error"]["code"] == "GC082" and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("may_be_used")
def test_verify_says_no(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`verify` reports that an artifact is damaged; no artifact, or one of a newer format, is an error."""
    (artifact / "spec.yaml").write_text("version: 1\n")
    outcome = run_here(capsys, "verify", str(artifact), "--json")
    assert outcome.status == 1 and outcome.data["passed"] is False
    first, *rest = outcome.data["checks"]
    assert first["name"] == "files" and first["passed"] is False and "spec.yaml" in first["detail"]
    assert rest and all(check["passed"] is None for check in rest)
    edit_manifest(artifact, schema_version=2)
    assert run_here(capsys, "verify", str(artifact), "--json").data["error"]["code"] == "GC081"
    assert run_here(capsys, "verify", str(artifact.parent / "base")).status == 3


# --- every check of verify can fail -----------------------------------------------------------------------------


def _graph_file(artifact: Path) -> None:
    """Put another graph into the file and list it correctly."""
    shutil.copy(artifact / "programs/0.base.eval.json", artifact / "programs/0.eval.json")
    _mend(artifact, "programs/0.eval.json")


def _certificate(artifact: Path) -> None:
    """Put the certificate of another fold into the file."""
    file = artifact / "certificates/fold.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "sites": data["sites"][::-1]}))
    _mend(artifact, "certificates/fold.json")


def _base(artifact: Path) -> None:
    weights = load_file(artifact.parent / "base" / "model.safetensors")
    weights["classifier.weight"] += 1
    save_file(weights, artifact.parent / "base" / "model.safetensors", metadata={"format": "pt"})


def _places(artifact: Path) -> None:
    edit_manifest(artifact, sites=lambda sites: sites[1:])


def _other_graph(artifact: Path) -> None:
    """Make manifest and file agree on a graph that the model does not give."""

    def change(signatures: list[Any]) -> list[Any]:
        graphs = dict(signatures[0]["graphs"])
        graphs["eval"] = {**graphs["eval"], "structure": graphs["base.eval"]["structure"]}
        captures = [{**c, "key": "0" * 64} for c in signatures[0]["captures"]]
        return [{**signatures[0], "graphs": graphs, "captures": captures}]

    _graph_file(artifact)
    edit_manifest(artifact, signatures=change)


@pytest.mark.full
@pytest.mark.usefixtures("may_be_used")
@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda artifact: _tensors(_swap, artifact), "tensors"),
        (_graph_file, "graph files"),
        (_base, "base"),
        (_places, "places"),
        (_other_graph, "graphs"),
        (_certificate, "certificate"),
        (lambda artifact: None, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_check_can_fail(
    spoil: Callable[[Path], None], check: str | None, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(artifact, base=lambda b: {**b, "reference": "/not/here", "relative": "../base"})
    spoil(artifact)
    outcome = run_here(capsys, "verify", str(artifact), "--json")
    failed = [c["name"] for c in outcome.data["checks"] if c["passed"] is False]
    assert failed == ([] if check is None else [check])
    assert outcome.status == (0 if check is None else 1) and outcome.data["passed"] is (check is None)
