"""A loaded model does not need its artifact's folder any more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb, tiny

IDS = torch.tensor([[5, 9, 4, 11], [8, 3, 6, 2]])
LORA = {"name": "a", "method": "lora", "rank": 2, "target": {"role": "attn.q"}}
IA3 = {"name": "b", "method": "ia3"}


def gone(folder: Path, other: Path) -> None:
    shutil.rmtree(folder)


def emptied(folder: Path, other: Path) -> None:
    for file in folder.rglob("*.json"):
        file.write_text("{}")


def another(folder: Path, other: Path) -> None:
    """Replace the folder by an artifact of another model, with the same names."""
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def with_labels(model: Any, work: Path) -> Tensor:
    values: Tensor = model(input_ids=IDS, labels=IDS).logits
    return values


def disabled(model: Any, work: Path) -> Tensor:
    model.disable("a")
    model.enable("a")
    return logits(model)


def added(model: Any, work: Path) -> Tensor:
    model.add(IA3)
    return logits(model)


def merged(model: Any, work: Path) -> Tensor:
    return logits(model.merge())


def saved(model: Any, work: Path) -> Tensor:
    model.save(work / "again")
    return logits(graftc.load(work / "again", model=model.compilation.source))


def logits(model: Any) -> Tensor:
    values: Tensor = model(input_ids=IDS).logits
    return values


@dataclass(frozen=True)
class Saved:
    """An artifact, its base and its logits, and an artifact of another model."""

    base: nn.Module
    artifact: Path
    expected: Tensor
    other: Path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    base, folder = tiny("llama"), tmp_path_factory.mktemp("saved")
    compiled = graftc.compile({"adapt": [LORA]}, base).eval()
    perturb(compiled)
    compiled(input_ids=IDS, labels=IDS)  # a second graph in the artifact
    compiled.save(folder / "artifact")
    other = graftc.compile({"adapt": [{**LORA, "target": {"role": "attn.k"}}]}, tiny("llama", layers=1))
    other.save(folder / "other")
    with torch.no_grad():
        return Saved(base, folder / "artifact", logits(compiled), folder / "other")


@pytest.mark.slow
@pytest.mark.sample("emptied-with_labels", "gone-merged", "gone-added")
@pytest.mark.parametrize("use", [disabled, added, with_labels, merged, saved])
@pytest.mark.parametrize("change", [gone, emptied, another])
def test_what_is_done_afterwards(
    artifact: Saved, change: Callable[[Path, Path], None], use: Callable[[Any, Path], Tensor], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(artifact.artifact, tmp_path / "artifact"))
    loaded = graftc.load(folder, model=artifact.base).eval()
    change(folder, artifact.other)
    with torch.no_grad():
        torch.testing.assert_close(use(loaded, tmp_path), artifact.expected, atol=1e-5, rtol=1e-5)
