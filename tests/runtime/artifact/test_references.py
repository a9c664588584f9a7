"""An artifact's reference to its base is data: nothing that it names is imported, called or looked up locally."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.runtime.artifact import open_artifact
from graftc.runtime.loading.base import find_base
from graftc.runtime.loading.verify import verify
from graftc.runtime.sources.models import load_hub
from graftc.runtime.sources.reference import Reference
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.folders import saved_artifact
from tests.runtime.artifact.support import edit_manifest

PAYLOAD = "raise SystemExit(__import__('pathlib').Path('pwned').write_text(__name__))\n"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    return saved_artifact(folder)


@pytest.fixture
def artifact(intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in a working folder that contains code under every name that an artifact may try."""
    shutil.copytree(intact, tmp_path / "artifact")
    (tmp_path / "payload.py").write_text(PAYLOAD)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text(PAYLOAD)
    (tmp_path / "package" / "payload.py").write_text(PAYLOAD)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "artifact"


CALLABLES = ("payload:make", "package.payload:make", "package:make", "os:getcwd", "graftc.testing.families:bert")
TEXTS = {
    "hub": (*CALLABLES, "/etc", "../base", "a/b/c", "a b", ".", "~", "x\x1b"),
    "folder": (*CALLABLES, "base", "~/base", "a/b", "/a/../b", ""),
    "inside": (*CALLABLES, "..", "../base", "/base"),
}
PLACES: dict[str, dict[str, Any]] = {
    **{f"{kind} {t}": {"kind": kind, "reference": t, "relative": None} for kind in TEXTS for t in TEXTS[kind]},
    "inside both": {"kind": "inside", "reference": "../base", "relative": "../base"},
    "inside elsewhere": {"kind": "inside", "reference": "base", "relative": "../base"},
    "relative that is absolute": {"kind": "folder", "reference": "/not/here", "relative": "/etc"},
    "relative that wanders": {"kind": "folder", "reference": "/not/here", "relative": "x/../../base"},
    "revision that is a path": {"kind": "hub", "reference": "org/base", "revision": "../../x"},
    "revision of a folder": {"kind": "folder", "reference": "/not/here", "revision": "main"},
    "nothing": {"kind": None, "reference": "payload:make"},
    "no text": {"kind": "hub", "reference": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACES)
def test_a_reference_that_does_not_fit_its_kind(name: str, artifact: Path) -> None:
    """Everything that opens the artifact refuses it as unsafe, and nothing is imported."""
    place = {"relative": None, "revision": None, **PLACES[name]}
    edit_manifest(artifact, base=lambda base: {**base, **place})
    with pytest.raises(GraftError) as caught:
        graftc.load(artifact)
    assert caught.value.code == "GC085" and caught.value.exit_code == 3
    assert not verify(artifact).passed
    assert not (artifact.parent / "pwned").exists()


@pytest.mark.parametrize("kind", ["module:x", "zz", 5, True, ["hub"]])
def test_a_kind_that_is_none(kind: object, artifact: Path) -> None:
    edit_manifest(artifact, base=lambda base: {**base, "kind": kind})
    with pytest.raises(GraftError) as caught:
        open_artifact(artifact)
    assert caught.value.code == "GC082"


@pytest.mark.slow
@pytest.mark.parametrize("text", CALLABLES)
def test_a_callable_is_never_called(text: str, artifact: Path) -> None:
    edit_manifest(artifact, base=lambda b: {**b, "kind": "callable", "reference": text, "relative": None})
    with pytest.raises(GraftError) as caught:
        graftc.load(artifact)
    assert caught.value.code == "GC086" and text in (caught.value.hint or "")
    checks = {check.name: check.passed for check in verify(artifact).checks}
    assert checks["files"] and checks["base"] is False
    assert not (artifact.parent / "pwned").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "org/base"])
def test_a_hub_id_is_no_folder_here(name: str, artifact: Path, intact: Path) -> None:
    """A folder of that name in the working folder is not what a hub id refers to."""
    shutil.copytree(intact.parent / "base", artifact.parent / name)
    edit_manifest(artifact, base=lambda b: {**b, "kind": "hub", "reference": name, "relative": None})
    with pytest.raises(GraftError, match="the hub has no such model") as caught:
        graftc.load(artifact)
    assert caught.value.code == "GC032"
    assert type(graftc.load(artifact, name).compilation.source).__name__ == "BertForSequenceClassification"


def test_a_hub_id_is_what_the_cache_holds(intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id refers to the cache, together with the commit by which it is found again."""
    repository = tmp_path / "hub" / "models--org--base"
    shutil.copytree(intact.parent / "base", repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = load_hub("org/base")
    reference = Reference.of(model)
    assert (reference.kind, reference.text, reference.revision) == ("hub", "org/base", "c" * 40)
    again = find_base(reference, tmp_path)
    assert all(
        bool((a == b).all()) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("code", ["modeling_payload.PayloadModel", "payload--modeling_payload.PayloadModel"])
def test_code_of_a_folder_is_not_run(code: str, artifact: Path, intact: Path) -> None:
    """Neither classes that a config maps to nor code in a folder are run."""
    base = artifact.parent / "base"
    shutil.copytree(intact.parent / "base", base)
    config = json.loads((base / "config.json").read_text())
    auto = {name: code for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification")}
    (base / "config.json").write_text(json.dumps({**config, "auto_map": auto}))
    (base / "modeling_payload.py").write_text(PAYLOAD)
    edit_manifest(artifact, base=lambda b: {**b, "kind": "folder", "reference": str(base), "relative": None})
    try:
        graftc.load(artifact)
    except GraftError as error:
        assert error.code in ("GC032", "GC087")
    assert not (artifact.parent / "pwned").exists()


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    """Every reference that graftc creates for a model is one that it accepts."""

    class Config:
        _name_or_path = ""
        _commit_hash = None

    class Model:
        config = Config()

    (tmp_path / "here").mkdir()
    kinds = {
        "": None,
        "gone/for/good": None,
        "/not/here": None,
        "bad\nname": None,
        "org/name": "hub",
        "name": "hub",
        "a.b:c": "callable",
        str(tmp_path / "here"): "folder",
        str(tmp_path / "here" / ".." / "here"): "folder",
    }
    for text, kind in kinds.items():
        Model.config._name_or_path = text
        reference = Reference.of(Model()).seen_from(tmp_path)  # type: ignore[arg-type]
        assert (reference.kind, reference.flaw()) == (kind, None)


# --- files --------------------------------------------------------------------------------------------------------

FILES = ("/dev/zero", "/etc/passwd", "../art/programs/0.eval.json", "spec.yaml/", "", ".", "programs/../spec.yaml", "/")


def _graph(file: str) -> dict[str, Any]:
    def change(signatures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        graphs = signatures[0]["graphs"]
        return [{**signatures[0], "graphs": {**graphs, "eval": {**graphs["eval"], "file": file}}}]

    return {"signatures": change}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("field", ["graph", "certificate"])
def test_a_field_names_no_file_of_the_artifact(field: str, file: str, artifact: Path) -> None:
    edit_manifest(artifact, **(_graph(file) if field == "graph" else {"certificate": file}))
    with pytest.raises(GraftError) as caught:
        open_artifact(artifact)
    assert caught.value.code == "GC085" and repr(file) in caught.value.message


def test_constants_need_their_file(artifact: Path) -> None:
    entry = {"dtype": "f32", "shape": [1], "trainable": False, "sha256": "0" * 64}
    edit_manifest(artifact, constants={"constant_0": entry})
    with pytest.raises(GraftError) as caught:
        open_artifact(artifact)
    assert caught.value.code == "GC083"


@pytest.mark.parametrize("field", ["num_hidden_layers", "nested"])
def test_a_base_of_more_layers_than_weights_is_refused_at_once(field: str, intact: Path, tmp_path: Path) -> None:
    """A hundred thousand layers would take minutes to create, whatever the files contain."""
    base = tmp_path / "base"
    shutil.copytree(intact.parent / "base", base)
    config = json.loads((base / "config.json").read_text())
    config |= {"num_hidden_layers": 100_000} if field != "nested" else {"text_config": {"n_layer": 100_000}}
    (base / "config.json").write_text(json.dumps(config))
    artifact = tmp_path / "artifact"
    shutil.copytree(intact, artifact)
    edit_manifest(artifact, base=lambda b: {**b, "reference": str(base), "relative": "../base", "settings": {}})
    started = time.monotonic()
    with pytest.raises(GraftError, match="100000 layers, but its files have") as caught:
        graftc.load(artifact)
    assert caught.value.code == "GC032" and time.monotonic() - started < 30
