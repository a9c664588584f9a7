"""A disk that fills up while the real writers write raises a coded error and leaves nothing behind.

`tests/files/test_files.py` injects the same fault at every single point of writing.
"""

from __future__ import annotations

import functools
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftc.runtime.compiled import Compiled
from graftc.runtime.export import onnx, pt2
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.folders import adapted_folder, saved_base, tree_bytes
from tests.kit.specs import lora

ROOM = (8, 40, 120, 240)
"""KiB; the smallest of what is written takes more than the last."""

JOBS: dict[str, Callable[[Compiled, Path], object]] = {
    "save": lambda compiled, path: compiled.save(path, force=True),
    "merge": lambda compiled, path: compiled.merge().save(path, force=True),
    "onnx": lambda compiled, path: compiled.merge().export(path, force=True),
    "pt2": lambda compiled, path: compiled.merge().export(path, format="pt2", force=True),
}


@pytest.fixture(scope="module", autouse=True)
def _exported_once() -> Iterator[None]:
    """Prepare each export only once: preparing takes seconds, and only the writing is meant to fail."""
    with pytest.MonkeyPatch.context() as patch:
        for exporter, name in ((onnx, "prepare_onnx"), (pt2, "prepare_pt2")):
            patch.setattr(exporter, name, functools.partial(_once, {}, getattr(exporter, name)))
        yield


def _once(prepared: dict[str, Any], prepare: Callable[..., Any], *args: Any) -> Any:
    if "it" not in prepared:
        prepared["it"] = prepare(*args)
    return prepared["it"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Adapters that are too large for the disk as well.
    entry = lora(["attn.q", "ffn.up", "ffn.down"], rank=40)
    return adapted_folder(saved_base(tmp_path_factory.mktemp("full") / "base"), {"adapt": [entry]})


def _fails(job: str, compiled: Compiled, path: Path) -> GraftError:
    with pytest.raises(GraftError) as caught:
        JOBS[job](compiled, path)
    assert caught.value.code == "GC064" and str(path) in caught.value.message
    return caught.value


@pytest.mark.slow
@pytest.mark.sample("save-120", "merge-120", "pt2-120")
@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("job", JOBS)
def test_a_full_disk(job: str, room: int, bert: Compiled, small_disk: Callable[[int], Path]) -> None:
    folder = small_disk(room)
    error = _fails(job, bert, folder / "deep" / "out")
    assert "No space left on device" in error.message and "the disk is full" in (error.hint or "")
    assert not any(folder.iterdir())


@pytest.mark.full
@pytest.mark.parametrize("job", JOBS)
def test_what_was_there_stays(job: str, bert: Compiled, tmp_path: Path) -> None:
    """With a limit on file sizes, as quotas impose, replacing fails and the old file is untouched."""
    path = tmp_path / "out"
    JOBS[job](bert, path)
    before = tree_bytes(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        _fails(job, bert, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert tree_bytes(tmp_path) == before
    JOBS[job](bert, path)
