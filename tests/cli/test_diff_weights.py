"""``graftc diff`` of two model folders: which tensors differ, by how much, and the probable cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graftc
from graftc.passes.core.weights.folds import round_once
from graftc.records.comparison import Difference
from graftc.runtime.compare import difference as module
from graftc.runtime.compare.difference import Matrices, difference
from graftc.runtime.compare.folders import compare_folders
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, tiny
from tests.cli.support import run_here, run_valid

pytestmark = pytest.mark.slow

ROWS, COLUMNS, RANK = 120, 90, 5


def measured(base: Tensor, other: Tensor) -> Difference:
    """Return the difference of two matrices."""
    pair = Matrices(lambda a, b: base[a:b], lambda a, b: other[a:b], (base.shape[0], base.shape[1]))
    return difference(pair, matrix=True)


def drawn(*shape: int) -> Tensor:
    """Return normally distributed numbers, the same for the same sizes."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def base_weight(dtype: torch.dtype) -> Tensor:
    return (drawn(ROWS, COLUMNS) * 0.05).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1.0, 0.05])
def test_ranks_above_the_noise(dtype: torch.dtype, size: float) -> None:
    """Rounding fills the spectrum but does not count; the share explained excludes it."""
    base = base_weight(dtype)
    update = drawn(ROWS, RANK) @ drawn(RANK, COLUMNS) * 0.05 * size / RANK**0.5
    other = round_once(base.double() + update, dtype)
    result = measured(base, other)
    assert (result.cause, result.rank, result.rows, result.columns) == ("low rank", RANK, ROWS, COLUMNS)
    change = other.double() - base.double()
    assert result.largest == float(change.abs().max())
    assert result.norm == pytest.approx(float(change.norm() / base.double().norm()), rel=1e-12)
    assert result.entries == pytest.approx(float((change != 0).double().mean()), rel=1e-12)
    values = torch.linalg.svdvals(change).square()
    assert result.explained == pytest.approx(float(values[:RANK].sum() / values.sum()), rel=1e-6)


def test_many_directions_are_looked_for_again() -> None:
    """A rank above the first limit, but below half of all, is found."""
    base = drawn(200, 150).float()
    result = measured(base, (base.double() + drawn(200, 60) @ drawn(60, 150) * 0.1).float())
    assert (result.cause, result.rank) == ("low rank", 60)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_causes(dtype: torch.dtype) -> None:
    base = base_weight(dtype)
    wide = base.double()
    some = wide.clone()
    some[[3, 7, 50]] += 0.05 * drawn(3, COLUMNS)
    part = wide.clone()
    part[40:80] += 0.05 * drawn(40, 2) @ drawn(2, COLUMNS)
    few = wide + 0.05 * drawn(ROWS, COLUMNS) * (torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS) % 89 == 0)
    cases = {
        "row scaling": wide * (1 + 0.2 * drawn(ROWS, 1)),
        "column scaling": wide * (1 + 0.2 * drawn(1, COLUMNS)),
        "rows": some,
        "low rank": part,
        "entries": few,
        "full": wide + 0.05 * drawn(COLUMNS, ROWS).T.flip(0),
        "rounding": round_once(wide * 3, dtype).double() / 3,
    }
    results = {cause: measured(base, round_once(other, dtype)) for cause, other in cases.items()}
    assert {cause: each.cause for cause, each in results.items()} == {cause: cause for cause in cases}
    assert results["rows"].rows == 3 and results["low rank"].rows == 40 and results["low rank"].rank == 2
    assert results["row scaling"].explained > 0.99  # type: ignore[operator]


def test_blocks_have_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_weight(torch.bfloat16)
    others = [base.double() * (1 + 0.2 * drawn(ROWS, 1)), base.double() + drawn(ROWS, 3) @ drawn(3, COLUMNS)]
    whole = [measured(base, round_once(other, torch.bfloat16)) for other in others]
    monkeypatch.setattr(module, "BLOCK", 7 * COLUMNS)
    for other, expected in zip(others, whole, strict=True):
        result = measured(base, round_once(other, torch.bfloat16))
        assert (result.cause, result.rank, result.largest) == (expected.cause, expected.rank, expected.largest)
        assert result.explained == pytest.approx(expected.explained, rel=1e-9)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in bfloat16, the same base in several files, a merged model, and an artifact."""
    folder = tmp_path_factory.mktemp("diff")
    model = tiny("llama").eval().bfloat16()
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "sharded", max_shard_size="60KB")
    adapt: list[Any] = [{"method": "lora", "rank": 3, "target": {"role": ["attn.q", "ffn.up"]}}]
    compiled = graftc.compile({"adapt": [*adapt, {"method": "ia3", "target": {"role": "attn.k"}}]}, model).eval()
    perturb(compiled)
    compiled.save(folder / "artifact", certify=False)
    compiled.merge().save(folder / "merged")
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int) -> Any:
    return run_valid(capsys, "diff", *map(str, arguments), status=status)


@pytest.mark.full
def test_what_a_merge_changed(capsys: pytest.CaptureFixture[str], models_folder: Path) -> None:
    """Each site is reported with its rank or scaling, and nothing else; a sharded base gives the same."""
    data = run(capsys, models_folder / "base", models_folder / "merged", status=1)
    assert data["same"] is False and data["tensors"] == [] and data["base"] == []
    differences = {tensor["name"]: tensor["difference"] for tensor in data["weights"]["tensors"]}
    for layer in range(2):
        for name in ("self_attn.q_proj", "mlp.up_proj"):
            item = differences.pop(f"model.layers.{layer}.{name}.weight")
            assert (item["cause"], item["rank"]) == ("low rank", 3) and item["explained"] > 0.99
        assert differences.pop(f"model.layers.{layer}.self_attn.k_proj.weight")["cause"] == "row scaling"
    assert not differences
    total = len(load_file(models_folder / "base" / "model.safetensors"))
    assert data["weights"]["equal"] == total - 6
    assert len(list((models_folder / "sharded").glob("*.safetensors"))) > 1
    assert run(capsys, models_folder / "sharded", models_folder / "merged", status=1)["weights"] == data["weights"]


@pytest.mark.full
def test_equal_models(capsys: pytest.CaptureFixture[str], models_folder: Path) -> None:
    data = run(capsys, models_folder / "base", models_folder / "sharded", status=0)
    assert data["same"] is True and data["weights"]["tensors"] == []
    assert "no difference" in run_here(capsys, "diff", str(models_folder / "base"), str(models_folder / "sharded")).out


def test_for_people(capsys: pytest.CaptureFixture[str], models_folder: Path) -> None:
    """Layers that differ in the same way are one line."""
    outcome = run_here(capsys, "diff", str(models_folder / "base"), str(models_folder / "merged"))
    assert outcome.status == 1
    assert "~ model.layers.{0-1}.mlp.up_proj.weight (2 tensors) BF16[" in outcome.out and "rank 3, which" in outcome.out
    assert "4 by a low-rank update of rank 3, such as LoRA's" in outcome.out
    assert "6 of 21 tensors differ" in outcome.out


def test_other_names_sizes_and_types(tmp_path: Path) -> None:
    """Differences are of values: a wider dtype with the same values is distinguished from a change."""
    one = {"a": drawn(6, 4).bfloat16(), "b": drawn(3), "gone": drawn(2), "c": torch.arange(5), "same": drawn(4, 4)}
    two = {"a": one["a"].float(), "b": drawn(4), "come": drawn(2), "c": torch.arange(5) + 2, "same": one["same"]}
    scalar = {"zero": torch.zeros(()), "empty": torch.zeros(0, 3), "none": torch.tensor([float("nan"), 1.0])}
    for name, tensors in (("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        save_file({**tensors, **scalar}, tmp_path / name / "model.safetensors")
    comparison = compare_folders(tmp_path / "one", tmp_path / "two")
    assert {item.name: item.status for item in comparison.tensors} == {
        **{"a": "retyped", "b": "reshaped", "gone": "removed", "come": "added", "c": "changed"}
    }
    (changed,) = (item.difference for item in comparison.tensors if item.name == "c")
    assert changed is not None and (changed.largest, changed.cause) == (2, "vector")
    assert comparison.equal == 4 and not comparison.same


def test_nan_is_no_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", float("nan"))):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((3, 3), value)}, tmp_path / name / "model.safetensors")
    (tensor,) = run(capsys, tmp_path / "one", tmp_path / "two", status=1)["weights"]["tensors"]
    assert tensor["difference"]["largest"] is None and tensor["difference"]["norm"] is None
    assert run_here(capsys, "diff", str(tmp_path / "one"), str(tmp_path / "two")).status == 1


def test_what_is_no_model_is_refused(capsys: pytest.CaptureFixture[str], models_folder: Path, tmp_path: Path) -> None:
    """Invalid folders are refused with a code.

    Cases: a folder of another kind, missing folders, pickles, missing or truncated files, and names that lead outside.
    """
    error = run(capsys, models_folder / "artifact", models_folder / "merged", status=2)["error"]
    assert error["code"] == "GC090" and "graftc merge" in error["hint"]
    assert run(capsys, tmp_path / "a", tmp_path / "b", status=3)["error"]["code"] == "GC080"
    assert run(capsys, models_folder / "base", tmp_path / "b", status=3)["error"]["code"] == "GC100"
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "config.json").write_text("{}")
    (pickles / "pytorch_model.bin").write_bytes(b"")
    error = run(capsys, models_folder / "base", pickles, status=3)["error"]
    assert error["code"] == "GC100" and ".bin" in error["hint"]
    broken = tmp_path / "broken"
    shutil.copytree(models_folder / "sharded", broken)
    index = broken / "model.safetensors.index.json"
    files = sorted(broken.glob("*.safetensors"))
    files[0].write_bytes(files[0].read_bytes()[:-5])
    assert run(capsys, models_folder / "base", broken, status=3)["error"]["code"] == "GC100"
    files[0].unlink()
    assert run(capsys, models_folder / "base", broken, status=3)["error"]["code"] == "GC100"
    table = json.loads(index.read_text())
    table["weight_map"] = {name: "../out.safetensors" for name in table["weight_map"]}
    index.write_text(json.dumps(table))
    assert run(capsys, models_folder / "base", broken, status=3)["error"]["code"] == "GC101"


def test_a_folder_that_is_none() -> None:
    with pytest.raises(GraftError) as caught:
        compare_folders(Path("/nowhere"), Path("/nowhere"))
    assert caught.value.code == "GC100"
