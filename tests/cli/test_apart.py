"""No command writes over, into or around its inputs, whatever links lead there and whether forced or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from graftc.runtime.artifact import open_artifact
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.support import run_here
from tests.kit.folders import SPEC, adapted_folder, saved_artifact, saved_base, tree_bytes


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a spec, a base and an artifact of it, each in its own folder."""
    folder = tmp_path_factory.mktemp("apart")
    (folder / "specs").mkdir()
    (folder / "specs" / "spec.yaml").write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    saved_artifact(folder)
    (folder / "link").symlink_to("artifact", target_is_directory=True)
    (folder / "link-to-base").symlink_to(folder / "base", target_is_directory=True)
    return folder


READING_ARTIFACT: dict[str, Callable[[str], list[str]]] = {
    "merge": lambda out: ["merge", "artifact", "--out", out],
    "merge --partial": lambda out: ["merge", "link", "--partial", "--out", out],
    "convert": lambda out: ["convert", "artifact", "--out", out],
    "export": lambda out: ["export", "artifact", "-f", "onnx", "--out", out],
    "export pt2": lambda out: ["export", "link", "-f", "pt2", "--out", out],
    "card": lambda out: ["card", "artifact", "--out", out],
    "inspect": lambda out: ["inspect", "artifact", "--dot", out],
    "inspect --graphml": lambda out: ["inspect", "artifact", "--graphml", out],
}


def leaves_it_alone(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> None:
    """Check that a command is an error, with and without ``--force``, and changes nothing."""
    before = tree_bytes(here)
    monkeypatch.chdir(here)
    for force in ([], ["--force"]):
        outcome = run_here(capsys, *words, *force, "--json")
        assert outcome.status == 3 and outcome.data["error"]["code"] == "GC063"
        assert outcome.data["error"]["hint"]
    assert tree_bytes(here) == before


@pytest.mark.slow
@pytest.mark.parametrize("command", READING_ARTIFACT)
@pytest.mark.parametrize(
    "out", ["artifact", "link", "artifact/out", "link/deep/out", "base/../artifact/spec.yaml", "."]
)
def test_the_artifact(
    command: str, out: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves_it_alone(here, capsys, monkeypatch, *READING_ARTIFACT[command](out))


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize("out", ["base", "base/out", "link-to-base/out", "../" * 30 + "{here}/base"])
def test_the_base_that_is_named(
    command: str, out: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = READING_ARTIFACT[command](out.format(here=str(here).lstrip("/")))
    leaves_it_alone(here, capsys, monkeypatch, *words, "--model", "base")


@pytest.mark.parametrize("out", ["base", "base/out", "link-to-base/out", "specs", "specs/spec.yaml", "."])
def test_compile(out: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    leaves_it_alone(here, capsys, monkeypatch, "compile", "specs/spec.yaml", "--model", "base", "--out", out)


@pytest.mark.slow
def test_a_base_that_graftc_wrote_is_not_replaced(tmp_path: Path) -> None:
    """In Python as well, where no base is named, a model loaded from a merged folder is not saved over it."""
    merged = adapted_folder(saved_base(tmp_path / "base")).merge().save(tmp_path / "merged")
    compiled = adapted_folder(merged)
    before = tree_bytes(merged)
    for write in (compiled.save, compiled.merge().save):
        with pytest.raises(GraftError) as caught:
            write(merged, force=True)
        assert caught.value.code == "GC063"
    assert tree_bytes(merged) == before
    compiled.save(tmp_path / "artifact")
    compiled.save(tmp_path / "artifact", force=True)
    assert open_artifact(tmp_path / "artifact").manifest.base.reference == str(merged)
