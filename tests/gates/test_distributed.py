"""Two gloo processes beside one: replicated (DDP) and sharded (FSDP2), what they train, write, keep and go on from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runtime.distributed_jobs import SHARDED
from tests.runtime.processes import together

JOBS = "tests.runtime.distributed_jobs"

pytestmark = pytest.mark.gate


@pytest.mark.parametrize("name", [*SHARDED, "spiel"])
def test_two_processes_train_as_one(name: str, tmp_path: Path) -> None:
    kinds = ("ddp", "fsdp") if name in SHARDED else ("ddp",)
    together(f"{JOBS}:train", 1, tmp_path, name, "one")
    expected = torch.load(tmp_path / f"{name}-one.pt")
    for kind in kinds:
        together(f"{JOBS}:train", 2, tmp_path, name, kind)
        found = torch.load(tmp_path / f"{name}-{kind}.pt")
        assert found.keys() == expected.keys()
        largest = max(float((found[n].double() - t.double()).abs().max()) for n, t in expected.items() if t.numel())
        print(f"{name} {kind}: largest difference {largest:.1e}")
        assert largest < 1e-5


@pytest.mark.parametrize(("name", "kind"), [("spiel", "fsdp"), ("spiel-ag", "ddp"), ("spiel-ag", "fsdp")])
def test_what_needs_whole_gradients_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    together(f"{JOBS}:refused", 2, tmp_path, name, kind)


def test_bases_that_others_have_spread_are_refused(tmp_path: Path) -> None:
    together(f"{JOBS}:parallel_bases", 2, tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    """What is in a folder."""
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
