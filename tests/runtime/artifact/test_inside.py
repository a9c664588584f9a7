"""Nothing is written into an artifact or a merged folder, all of whose files are listed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.files.destinations import SEALED
from graftc.files.writing import write_text
from graftc.runtime.artifact.manifest import MANIFEST
from graftc.runtime.artifact.places import RECORD
from graftc.runtime.artifact.read import open_artifact
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, tiny

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}


@pytest.fixture(scope="module")
def models_in_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    compiled: Any = graftc.compile(SPEC, tiny("llama").eval()).eval()
    perturb(compiled)
    folder = tmp_path_factory.mktemp("made")
    merged = compiled.merge()
    compiled.save(folder / "artifact")
    merged.save(folder / "merged")
    return compiled, merged, folder


WRITES: dict[str, Callable[[Any, Any, Path], Any]] = {
    "merged": lambda compiled, merged, to: merged.save(to),
    "merged, by force": lambda compiled, merged, to: merged.save(to, force=True),
    "artifact": lambda compiled, merged, to: compiled.save(to),
    "onnx": lambda compiled, merged, to: compiled.export(to),
    "onnx-generate": lambda compiled, merged, to: merged.export(to, "onnx-generate"),
    "pt2": lambda compiled, merged, to: merged.export(to, "pt2"),
    "peft": lambda compiled, merged, to: compiled.export(to, "peft"),
    "gguf": lambda compiled, merged, to: compiled.export(to, "gguf"),
    "view": lambda compiled, merged, to: compiled.view().save(to.with_suffix(".html")),
    "text": lambda compiled, merged, to: write_text(to, "a"),
}


def test_the_names() -> None:
    assert SEALED == {MANIFEST: "artifact", RECORD: "merged"}


@pytest.mark.sample(
    "artifact-artifact-o",
    "peft-artifact-new/folder/o",
    "gguf-artifact-new/folder/o",
    "peft-artifact-o",
    "peft-merged-programs/o",
)
@pytest.mark.slow
@pytest.mark.parametrize("place", ["o", "programs/o", "new/folder/o"])
@pytest.mark.parametrize("kind", ["artifact", "merged"])
@pytest.mark.parametrize("write", WRITES)
def test_refused(models_in_folder: tuple[Any, Any, Path], write: str, kind: str, place: str) -> None:
    """Writing is refused with a code that names the folder, which stays unchanged."""
    compiled, merged, folder = models_in_folder
    before = sorted(folder.rglob("*"))
    with pytest.raises(GraftError, match="make it unreadable") as caught:
        WRITES[write](compiled, merged, folder / kind / place)
    assert caught.value.code == "GC063" and caught.value.hint
    assert sorted(folder.rglob("*")) == before
    open_artifact(folder / "artifact")
    assert verify(folder / "merged", None, files_only=True).passed


def test_through_a_link_and_from_within(
    models_in_folder: tuple[Any, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, _, folder = models_in_folder
    (tmp_path / "link").symlink_to(folder / "artifact")
    monkeypatch.chdir(folder / "artifact")
    for place in (tmp_path / "link" / "o", Path("o"), Path("../artifact/o")):
        with pytest.raises(GraftError, match="make it unreadable"):
            compiled.export(place, "peft")
    assert "o" not in os.listdir()


def test_what_stays_allowed(models_in_folder: tuple[Any, Any, Path], tmp_path: Path) -> None:
    """The folder itself can be replaced by force; folders beside it and foreign folders with such names are allowed."""
    compiled, merged, folder = models_in_folder
    for kind in ("artifact", "merged"):
        shutil.copytree(folder / kind, tmp_path / kind)
    compiled.save(tmp_path / "artifact", force=True, certify=False)
    merged.save(tmp_path / "merged", force=True)
    write_text(tmp_path / "beside", "a")
    for number, text in enumerate(('{"name": "a web app"}', '["artifact", "graftc"]', "no json", "")):
        other = tmp_path / f"other{number}"
        other.mkdir()
        (other / MANIFEST).write_text(text)
        assert write_text(other / "inside", "a").read_text() == "a"


QUICK = ["merged", "artifact", "peft", "text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["link/../new", "link/../folder/new", "link/inner/../../new", "link/../folder/../new"]
)
@pytest.mark.parametrize("write", QUICK)
def test_a_step_up_leads_above_what_a_link_leads_to(
    models_in_folder: tuple[Any, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str, where: str
) -> None:
    """``..`` after a link is resolved as the system does: the output is there, and nowhere else."""
    compiled, merged, _ = models_in_folder
    (tmp_path / "other" / "target" / "inner").mkdir(parents=True)
    (tmp_path / "other" / "folder").mkdir()
    (tmp_path / "link").symlink_to("other/target")
    for path in (tmp_path / where, Path(where)):
        monkeypatch.chdir(tmp_path)
        WRITES[write](compiled, merged, path)
        assert os.path.exists(tmp_path / where)
        assert sorted(each.name for each in tmp_path.iterdir()) == ["link", "other"]
        if write in ("merged", "artifact"):
            assert verify(path, None, files_only=True).passed
        (shutil.rmtree if path.is_dir() else os.unlink)(path)


@pytest.mark.parametrize(
    "path",
    ["a\0b/c", "a\0b/../c", "gone/../artifact", "../" * 40 + "gone", "a" * 300 + "/../c", "a" * 300, "a/" * 5000],
)
def test_paths_to_nothing_are_coded_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (graftc.load, open_artifact, lambda path: verify(path, None, files_only=True)):
        with pytest.raises(GraftError) as caught:
            read(path)
        assert caught.value.code == ("GC073" if read is graftc.load and "\0" in path else "GC080")
