"""``import-peft`` and ``export --format peft``: round trips, and refusals before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftc.testing import tiny
from tests.cli.support import run_here, run_valid
from tests.kit.comparing import same_tensors

QUERY = "base_model.model.bert.encoder.layer.{}.attention.self.query.lora_{}.weight"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and an adapter of it in PEFT's format."""
    monkeypatch.chdir(tmp_path)
    tiny("bert").save_pretrained("base")  # type: ignore[operator]
    Path("adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query"], "task_type": None}
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 48), "B": (48, 2)}
    tensors = {
        QUERY.format(i, part): torch.randn(shape, generator=generator)
        for i in range(2)
        for part, shape in shapes.items()
    }
    save_file(tensors, "adapter/adapter_model.safetensors")
    return tmp_path


@pytest.mark.full
def test_there_and_back(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    imported = run_valid(capsys, "import-peft", "adapter", "--model", "base", "--out", "artifact")
    assert (imported["peft_types"], imported["methods"], imported["certificate"]["passed"]) == (
        ["LORA"],
        ["lora"],
        True,
    )
    assert {own["key"] for own in imported["tensors"]} == set(load_file("adapter/adapter_model.safetensors"))
    exported = run_valid(capsys, "export", "artifact", "--format", "peft", "--out", "back")
    assert exported["tensors"] == imported["tensors"] and exported["merged"] is False
    first, second = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("adapter", "back"))
    assert same_tensors(first, second)
    assert run_valid(capsys, "export", "artifact", "-f", "peft", "-o", "back", status=3)["error"]["code"] == "GC063"
    run_valid(capsys, "export", "artifact", "-f", "peft", "-o", "back", "--force")
    error = run_valid(capsys, "export", "artifact", "-f", "peft", "-o", "other", "--inputs", "lora", status=2)["error"]
    assert error["code"] == "GC090"
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "artifact", "back", "base"]


@pytest.mark.slow
def test_nothing_is_written(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    imported = run_valid(capsys, "import-peft", "adapter", "--model", "base", "--dry-run", "--no-certify")
    assert len(imported["tensors"]) == 4 and imported["files"] == [] and imported["certificate"] is None
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    error = run_valid(capsys, "import-peft", "adapter", "--model", "base", "--out", "artifact", status=3)["error"]
    assert error["code"] == "GC113" and len(error["details"]) == 4
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "peft_type": "POLY"}))
    error = run_valid(capsys, "import-peft", "adapter", "--model", "missing", "--out", "artifact", status=2)["error"]
    assert error["code"] == "GC112"
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


@pytest.mark.slow
def test_two_folders_are_one_artifact(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    shutil.copytree("adapter", "other")
    imported = run_valid(capsys, "import-peft", "adapter", "other", "--model", "base", "--out", "artifact")
    assert imported["adapters"] == ["adapter", "other"] and imported["methods"] == ["lora", "lora"]
    assert {own["tensor"].split(".graftc.")[1] for own in imported["tensors"]} == {
        *("adapter.A", "adapter.B", "other.A", "other.B")
    }
    error = run_valid(capsys, "import-peft", "adapter", "adapter", "--model", "base", "--dry-run", status=2)["error"]
    assert error["code"] == "GC005"


def test_tables_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "import-peft", "adapter", "--model", "base", "--dry-run")
    assert outcome.status == 0
    assert outcome.out.startswith("LORA as lora: 4 tensors\n")
    assert outcome.out.count("lora_A") == outcome.out.count("lora_B") == 2
