"""axolotl's own command with ``adapter: graftc`` and with ``adapter: lora``, in axolotl's environment.

``make axolotl`` makes the environment and runs this file.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import graftc
from tests.applications.trl.trl_files import write_files
from tests.kit.places import ROOT

PYTHON = Path(os.environ.get("GRAFTC_AXOLOTL", ROOT / ".venv-axolotl" / "bin" / "python"))
pytestmark = [
    pytest.mark.gate,
    pytest.mark.skipif(not PYTHON.is_file(), reason="needs axolotl's environment: make axolotl"),
]
OBSERVER = "tests.gates.axolotl_observer.Plugin"
CONFIG: dict[str, Any] = {
    **{"base_model": "base", "tokenizer_type": "PreTrainedTokenizerFast", "sequence_len": 32, "val_set_size": 0},
    "datasets": [
        {
            "path": "texts/train.jsonl",
            "ds_type": "json",
            "type": {
                **{"field_instruction": "prompt", "field_output": "completion"},
                **{"format": "{instruction}", "no_input_format": "{instruction}"},
            },
        }
    ],
    **{"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]},
    **{"lora_qkv_kernel": False, "lora_mlp_kernel": False, "lora_o_kernel": False, "lora_embedding_kernel": False},
    **{"micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4, "num_epochs": 1, "seed": 3},
    **{"learning_rate": 5e-3, "optimizer": "adamw_torch", "lr_scheduler": "linear", "logging_steps": 1},
    **{"save_strategy": "no", "bf16": False, "fp16": False, "tf32": False, "gradient_checkpointing": False},
    "dataset_prepared_path": "prepared",
}
OURS: dict[str, Any] = {"adapter": "graftc", "plugins": [OBSERVER, "graftc.axolotl.GraftcPlugin"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base and data."""
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(name: str, **changes: Any) -> subprocess.CompletedProcess[str]:
    """Run axolotl's command, with an output folder of that name."""
    settings = {**CONFIG, "output_dir": name, "plugins": [OBSERVER], **changes}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
    words = [str(PYTHON), "-m", "axolotl.cli.train", f"{name}.yaml"]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, **own}, timeout=300)


def losses(name: str) -> list[float]:
    values: list[float] = json.loads(Path(name, "losses.json").read_text(encoding="utf-8"))
    return values


def test_losses_and_adapters_are_those_of_lora(folder: Path) -> None:
    for name, changes in (("theirs", {"adapter": "lora"}), ("ours", {**OURS, "graftc_artifact": "kept"})):
        done = trained(name, **changes)
        assert done.returncode == 0, done.stderr[-2000:]
    assert losses("ours") == pytest.approx(losses("theirs"), rel=1e-5) and len(set(losses("ours"))) == 4
    mine, expected = (load_file(f"{name}/adapter_model.safetensors") for name in ("ours", "theirs"))
    assert mine.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-5)
    ids = torch.tensor([[5, 6, 7, 8]])
    base: Any = graftc.load_base("base")
    kept: Any = graftc.load("kept", base)
    imported: Any = graftc.import_peft("theirs", base)
    torch.testing.assert_close(kept(input_ids=ids).logits, imported(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_a_spec_that_peft_cannot_express(folder: Path) -> None:
    spec = {"adapt": [{"method": "loreft", "rank": 2}]}
    refused = trained("out", **OURS, graftc_spec=spec)
    assert refused.returncode and "GC115" in refused.stderr + refused.stdout
    done = trained("out", **OURS, graftc_spec=spec, graftc_artifact="kept", gradient_checkpointing=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(losses("out"))) == 4 and not Path("out/adapter_config.json").exists()
    ids, base = torch.tensor([[5, 6, 7, 8]]), graftc.load_base("base")
    kept: Any = graftc.load("kept", base)
    with kept.disabled():
        plain = kept(input_ids=ids).logits
    assert not torch.allclose(kept(input_ids=ids).logits, plain, atol=1e-4)


@pytest.mark.parametrize("key", [{"rl": "dpo"}, {"load_in_4bit": True}, {"lora_model_dir": "theirs"}])
def test_keys_that_cannot_be_honoured(key: dict[str, Any], folder: Path) -> None:
    refused = trained("out", **OURS, **key)
    assert refused.returncode and f"does not support axolotl's {next(iter(key))}" in refused.stderr + refused.stdout
