"""Signatures of an artifact: loading compiles the first one, and the others are compiled when calls need them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.testing import outputs_of, perturb, same_bits
from tests.kit.folders import adapted_folder, saved_base, tree_bytes
from tests.kit.refusals import refused
from tests.runtime.artifact.support import edit_manifest

IDS = torch.tensor([[5, 17, 40, 9], [8, 3, 21, 30]])
LABELS = {"input_ids": IDS, "labels": torch.tensor([0, 2])}
HIDDEN = {"input_ids": IDS, "output_hidden_states": True}


def count(compiled: Any) -> int:
    return len(compiled.compilation.signatures)


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """An artifact with three signatures, and the outputs of calls with the last two."""
    folder = tmp_path_factory.mktemp("used")
    compiled = adapted_folder(saved_base(folder / "base")).eval()
    outputs = {"labels": outputs_of(compiled, LABELS), "hidden": outputs_of(compiled, HIDDEN)}
    assert count(compiled) == 3
    return Path(compiled.save(folder / "artifact")), outputs


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a graph was captured again")


@pytest.fixture
def no_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", "off")
    monkeypatch.setattr("graftc.compiler.capture.capture_cache.capture", never)


@pytest.mark.slow
@pytest.mark.usefixtures("no_capture")
def test_each_is_compiled_by_the_call_that_needs_it(used: tuple[Path, dict[str, Any]]) -> None:
    path, expected = used
    loaded = graftc.load(path).eval()
    assert count(loaded) == 1
    assert same_bits(outputs_of(loaded, HIDDEN), expected["hidden"])
    assert count(loaded) == 2
    assert same_bits(outputs_of(loaded, LABELS), expected["labels"])
    assert count(loaded) == 3 and loaded.report.cached


@pytest.mark.sample("False")
@pytest.mark.slow
@pytest.mark.usefixtures("no_capture")
@pytest.mark.parametrize("called", [False, True])
def test_saving_keeps_those_that_were_not_called(used: tuple[Path, dict[str, Any]], called: bool) -> None:
    path, expected = used
    loaded = graftc.load(path).eval()
    if called:
        outputs_of(loaded, HIDDEN)
    loaded.save(folder := path.parent / f"again-{called}")
    again = graftc.load(folder).eval()
    if not called:
        assert tree_bytes(folder) == tree_bytes(path)
    assert same_bits(outputs_of(again, LABELS), expected["labels"])
    assert same_bits(outputs_of(again, HIDDEN), expected["hidden"])
    assert count(again) == 3


@pytest.mark.slow
def test_trained_tensors_stay(used: tuple[Path, dict[str, Any]]) -> None:
    """A signature that is compiled after training reads the trained tensors, not those in the file."""
    path, expected = used
    loaded, eager = graftc.load(path).eval(), graftc.load(path).eval()
    outputs_of(eager, LABELS)
    for model in (loaded, eager):
        perturb(model, 0.5, seed=4)
    assert same_bits(outputs_of(loaded, LABELS), outputs_of(eager, LABELS))
    assert not same_bits(outputs_of(loaded, LABELS), expected["labels"])


@pytest.mark.slow
def test_threads_compile_each_once(used: tuple[Path, dict[str, Any]]) -> None:
    path, expected = used
    loaded, results = graftc.load(path).eval(), list[bool]()

    def run(inputs: dict[str, Any], name: str) -> None:
        results.append(same_bits(outputs_of(loaded, inputs), expected[name]))

    threads = [
        threading.Thread(target=run, args=each) for each in ((LABELS, "labels"), (HIDDEN, "hidden")) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6 and count(loaded) == 3


def _other_graph(signatures: list[Any]) -> list[Any]:
    graphs = signatures[1]["graphs"]
    graphs = {**graphs, "eval": {**graphs["eval"], "structure": "0" * 32}}
    return [signatures[0], {**signatures[1], "graphs": graphs}, signatures[2]]


@pytest.mark.slow
def test_another_graph_is_refused_by_every_call_that_needs_it(
    used: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Calls with other signatures work, and the model is not saved with a graph that is not the spec's."""
    path, expected = used
    shutil.copytree(path, tmp_path / "it")
    edit_manifest(tmp_path / "it", signatures=_other_graph)
    loaded = graftc.load(tmp_path / "it", str(path.parent / "base")).eval()
    for _ in range(2):
        assert "different eval graph" in refused(loaded, **LABELS, code="GC088").message
    assert same_bits(outputs_of(loaded, HIDDEN), expected["hidden"])
    refused(loaded.save, tmp_path / "again", code="GC088")
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
def test_one_that_is_listed_again_and_again_is_refused(used: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, _ = used
    shutil.copytree(path, tmp_path / "it")
    edit_manifest(tmp_path / "it", signatures=lambda signatures: [*signatures, signatures[1], signatures[1]])
    loaded = graftc.load(tmp_path / "it", str(path.parent / "base")).eval()
    assert "lists a signature twice" in refused(loaded, **LABELS, code="GC082").message


@pytest.mark.slow
@pytest.mark.usefixtures("no_capture")
def test_a_folder_that_is_gone(used: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """The graphs of a removed artifact are captured again, from the model."""
    path, _ = used
    shutil.copytree(path, tmp_path / "it")
    loaded = graftc.load(tmp_path / "it", str(path.parent / "base")).eval()
    shutil.rmtree(tmp_path / "it")
    with pytest.raises(AssertionError, match="captured again"):
        outputs_of(loaded, LABELS)
