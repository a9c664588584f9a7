"""Two gloo processes compared with one, replicated (DDP) and sharded (FSDP2): training, files and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runtime.model.distributed_jobs import SHARDED
from tests.runtime.processes import together

JOBS = "tests.runtime.model.distributed_jobs"

pytestmark = pytest.mark.gate


def largest(path: Path, expected: Path) -> float:
    """Return the largest difference between two files of tensors."""
    one, two = torch.load(path), torch.load(expected)
    assert one.keys() == two.keys()
    return max(float((one[name].double() - tensor.double()).abs().max()) for name, tensor in two.items())


@pytest.mark.parametrize("name", [*SHARDED, "spiel"])
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    kinds = ("ddp", "fsdp") if name in SHARDED else ("ddp",)
    together(f"{JOBS}:train", 1, tmp_path, name, "one")
    for kind in kinds:
        together(f"{JOBS}:train", 2, tmp_path, name, kind)
        difference = largest(tmp_path / f"{name}-{kind}.pt", tmp_path / f"{name}-one.pt")
        print(f"{name} {kind}: largest difference {difference:.1e}")
        assert difference < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("spiel", "fsdp"), ("spiel-ag", "ddp"), ("spiel-ag", "fsdp")])
def test_what_needs_whole_gradients_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    together(f"{JOBS}:training_refused", 2, tmp_path, name, kind)


def test_bases_that_others_have_spread_are_refused(tmp_path: Path) -> None:
    together(f"{JOBS}:parallel_bases", 2, tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sharded_model_is_saved_merged_and_exported_to_the_bit(tmp_path: Path) -> None:
    formats = "peft,pt2,onnx"
    one, two = tmp_path / "one", tmp_path / "two"
    for place, processes, kind in ((one, 1, "one"), (two, 2, "fsdp")):
        place.mkdir()
        together(f"{JOBS}:artifacts", processes, place, kind, formats)
    assert files(one / "artifact") == files(two / "artifact")
    assert files(one / "merged") == files(two / "merged")
    for format in formats.split(","):
        paths = [folder / format for folder in (one, two)]
        assert paths[0].exists()
        assert paths[0].is_dir() or paths[0].read_bytes() == paths[1].read_bytes()
        assert not paths[0].is_dir() or files(paths[0]) == files(paths[1])
    expected = torch.load(one / "made")
    torch.testing.assert_close(torch.load(two / "made"), expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.load(two / "other"), expected[:3], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["overlay", "adalora"])
@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1)])
def test_a_distributed_checkpoint_is_resumed(name: str, before: int, after: int, tmp_path: Path) -> None:
    together(f"{JOBS}:kept", before, tmp_path, name, "fsdp")
    together(f"{JOBS}:resumed", after, tmp_path, name, "fsdp")
    difference = largest(tmp_path / f"resumed-{after}.pt", tmp_path / "whole.pt")
    print(f"{name}, {before} to {after}: largest difference {difference:.1e}")
    assert difference == 0 if before == after else difference < 1e-5


@pytest.mark.parametrize("job", ["policies", "full_states", "parts", "sixteen_bits", "quantised_in_16_bits"])
def test_sharded(job: str, tmp_path: Path) -> None:
    together(f"{JOBS}:{job}", 2, tmp_path)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp-recomputed", "fsdp-meta"])
def test_accelerate(kind: str, tmp_path: Path) -> None:
    together(f"{JOBS}:accelerated", 2, tmp_path, kind)
    if kind != "fsdp-meta":
        together(f"{JOBS}:train", 1, tmp_path, "overlay", "one")
        difference = largest(tmp_path / f"overlay-{kind}.pt", tmp_path / "overlay-one.pt")
        print(f"accelerate, {kind}: largest difference {difference:.1e}")
        assert difference < 1e-5


@pytest.mark.parametrize("name", ["overlay", "adalora"])
def test_the_trainer(name: str, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for place, processes in ((one, 1), (two, 2)):
        place.mkdir()
        together(f"{JOBS}:trainer", processes, place, name, "whole")
    difference = largest(two / f"{name}-whole-2.pt", one / f"{name}-whole-1.pt")
    print(f"trainer, {name}: largest difference {difference:.1e}")
    assert difference < 1e-5
    for processes in (2, 1):
        together(f"{JOBS}:trainer", processes, two, name, "resumed")
        difference = largest(two / f"{name}-resumed-{processes}.pt", two / f"{name}-whole-2.pt")
        print(f"trainer, {name}: resumed with {processes}: largest difference {difference:.1e}")
        assert difference == 0 if processes == 2 else difference < 1e-5


@pytest.mark.parametrize("title", ["ddp.py", "fsdp2.py", "accelerated.py", "trainer.py"])
def test_the_examples_of_the_page_run(title: str, tmp_path: Path) -> None:
    together(f"{JOBS}:documented", 2, tmp_path, title)
