"""Killed at random moments, saving, merging and exporting leave a destination that is absent or complete.

`tests/files/test_files.py` covers every single point of writing; here the real writers run.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from graftc.files.writing import recover
from graftc.runtime.artifact import open_artifact
from graftc.runtime.loading.verify import verify
from tests.kit.folders import saved_artifact, tree_bytes
from tests.kit.forks import Worker

KILLS = int(os.environ.get("GRAFTC_KILLS", "3"))
"""Runs of each job that are killed; ``make gates`` has 50."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    saved_artifact(folder)
    return folder


@pytest.fixture(scope="module")
def worker(place: Path) -> Iterator[Worker]:
    running = Worker("tests.runtime.artifact.worker", place)
    yield running
    running.process.kill()
    running.process.wait()


def _artifact(path: Path) -> object:
    return open_artifact(path).tensors()


def _merged(path: Path) -> object:
    assert verify(path).passed
    return load_file(path / "model.safetensors")


def _onnx(path: Path) -> object:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _pt2(path: Path) -> object:
    return torch.export.load(path)


def _digest(folder: Path) -> bytes:
    """Return the digest of a folder's contents.

    A program is an archive whose entries are below the name of a temporary file, which is left out.
    """
    contents = tree_bytes(folder)
    for name in [name for name in contents if name.endswith(".pt2")]:
        with ZipFile(BytesIO(contents.pop(name))) as archive:  # reading compares checksums
            contents |= {f"{name}/{entry.partition('/')[2]}": archive.read(entry) for entry in archive.namelist()}
    return hashlib.sha256(repr(sorted(contents.items())).encode()).digest()


JOBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "save": ("saved", _artifact),
    "save over": ("saved", _artifact),
    "merge": ("merged", _merged),
    "onnx": ("m.onnx", _onnx),
    "onnx over": ("m.onnx", _onnx),
    "pt2": ("m.pt2", _pt2),
}


@pytest.mark.slow
@pytest.mark.sample("save over")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("job", JOBS)
def test_killed_at_random(job: str, place: Path, worker: Worker) -> None:
    name, read = JOBS[job]
    over, out = job.endswith("over"), place / "out"
    path = out / name

    def start() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    def once() -> float:
        if not over:
            start()
        status, seconds = worker.run(job)
        assert status == 0
        return seconds

    start()
    if over:
        assert worker.run(job.removesuffix(" over"))[0] == 0
    takes = min(once() for _ in range(2))
    rng, killed, tries, outcomes = random.Random(job), 0, 0, set()
    readable: set[bytes] = set()  # digests of contents that need not be read again
    late = not over and KILLS >= 50  # one kill has to come after everything was written
    while killed < KILLS or (late and True not in outcomes):
        assert tries < 8 * KILLS, "none was killed when all was written"
        if not over:
            start()
        # One moment in each part of the job's time; any moment if the job had finished by then. Runs on a busy machine
        # take longer than the two that were measured, so the moments after those are around the end.
        if killed >= KILLS:
            moment = rng.uniform(0.8, 2.0)
        else:
            moment = (killed + rng.random()) / KILLS if tries == killed else rng.random()
        status, seconds = worker.run(job, takes * moment)
        tries += 1
        killed += status == -9
        if status == 0:  # the machine was busier when it was measured
            takes = min(takes, seconds)
        assert status in (0, -9), worker.told()
        if not path.exists():
            recover(out)  # as the next run does; it may complete a write that was nearly done
        outcomes.add(path.exists())
        if path.exists() and (digest := _digest(out)) not in readable:
            read(path)
            readable.add(digest)
        recover(out)
        beside = {f"{name}.data"} if "onnx" in job else set()
        assert {p.name for p in out.iterdir()} <= {name, *beside}
        assert path.exists() or not any(out.iterdir())
    assert outcomes == {True} if over else False in outcomes
    assert over or KILLS < 50 or True in outcomes, "none was killed when all was written"
    free = over or not path.exists()
    assert worker.run(job)[0] == (0 if free else 1)  # 1: something complete is in the way
