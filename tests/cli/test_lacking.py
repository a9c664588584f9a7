"""A checkpoint with missing tensors is refused unless all of the missing ones are trained in full."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

import graftc
from graftc.runtime.sources.models import load_model
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.support import run_here
from tests.kit.folders import SPEC, saved_artifact

HEAD = {**SPEC, "train": ["classifier"]}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and its artifact."""
    folder = tmp_path_factory.mktemp("lacking")
    saved_artifact(folder, certify=False)
    return folder


def spoiled(intact: Path, folder: Path, *patterns: str, resize: str = "") -> Path:
    """Copy the base without the tensors that begin with a pattern."""
    shutil.copytree(intact / "base", folder / "base")
    shutil.copytree(intact / "artifact", folder / "artifact")
    file = folder / "base" / "model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if not name.startswith(patterns or ("-",))}
    if resize:
        tensors[resize] = tensors[resize][:-1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    (folder / "head.yaml").write_text(yaml.safe_dump(HEAD), encoding="utf-8")
    return folder


GONE = {
    "one bias": ("bert.encoder.layer.1.output.dense.bias",),
    "a layer": ("bert.encoder.layer.0.",),
    "the embeddings": ("bert.embeddings.word_embeddings",),
    "the head": ("classifier.",),
    "norms": ("bert.embeddings.LayerNorm", "bert.encoder.layer.1.attention.output.LayerNorm"),
    "half of it": ("bert.encoder.", "classifier.bias"),
}


@pytest.mark.full
@pytest.mark.parametrize("gone", GONE)
def test_every_command_refuses_it(
    gone: str, intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = spoiled(intact, tmp_path, *GONE[gone])
    monkeypatch.chdir(here)
    commands = [["check", "spec.yaml", "--model", "base"]]
    if gone == "the head":
        commands += [["compile", "spec.yaml", "--model", "base", "--out", "new"]]
        commands += [["merge", "artifact", "--model", "base", "--out", "new"]]
        commands += [["export", "artifact", "-f", "onnx", "--model", "base", "--out", "new"]]
    for words in commands:
        outcome = run_here(capsys, *words, "--json")
        assert outcome.status == 3 and outcome.data["error"]["code"] == "GC089", words
        assert "lacks" in outcome.data["error"]["message"] and outcome.data["error"]["hint"]
        assert any(GONE[gone][0] in detail for detail in outcome.data["error"]["details"])
    assert not (here / "new").exists()
    with pytest.raises(GraftError, match="GC089"):
        graftc.load(here / "artifact", str(here / "base"))


@pytest.mark.full
def test_no_weights_are_needed_on_meta(intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = spoiled(intact, tmp_path, "bert.")
    assert run_here(capsys, "check", str(here / "spec.yaml"), "--model", str(here / "base"), "--meta").status == 0


@pytest.mark.slow
def test_a_tensor_of_another_size(intact: Path, tmp_path: Path) -> None:
    here = spoiled(intact, tmp_path, resize="bert.encoder.layer.0.output.dense.bias")
    with pytest.raises(GraftError) as caught:
        graftc.check(SPEC, load_model(str(here / "base")))
    assert caught.value.code in ("GC032", "GC089")


@pytest.mark.slow
def test_a_new_head_is_trained(intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new head's initial values do not matter; each load draws the same, so that the artifact recognises its base."""
    here = spoiled(intact, tmp_path, "classifier.")
    words = ["compile", str(here / "head.yaml"), "--model", str(here / "base"), "--out", str(here / "new")]
    assert run_here(capsys, *words, "--no-certify").status == 0
    loaded: Any = graftc.load(here / "new")
    assert {record.base for record in loaded.snapshot.trained} == {"classifier.bias", "classifier.weight"}
    half = {**SPEC, "train": ["classifier.weight"]}
    with pytest.raises(GraftError) as caught:
        graftc.check(half, load_model(str(here / "base")))
    assert caught.value.code in ("GC011", "GC089")


@pytest.mark.slow
def test_a_bare_encoder_under_a_head(intact: Path, tmp_path: Path) -> None:
    """The usual case: an encoder's checkpoint, loaded with the class of a classifier."""
    from transformers import BertModel

    here = spoiled(intact, tmp_path)
    config = json.loads((here / "base" / "config.json").read_text())
    BertModel.from_pretrained(here / "base").save_pretrained(here / "bare")
    (here / "bare" / "config.json").write_text(json.dumps(config))
    model = load_model(str(here / "bare"))
    graftc.check(HEAD, model)
    with pytest.raises(GraftError, match="classifier"):
        graftc.check(SPEC, model)
