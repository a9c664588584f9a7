"""``graftc trl``: what TRL's command line trains with PEFT, over compiled models."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import graftc
from graftc.applications.trl.settings import TRAINERS, read_settings
from graftc.cli.commands.trl import TrlTrainer
from tests.applications.trl.trl_files import PEFT, run_of_trl, write_config, write_files
from tests.cli.support import Outcome, run_here

pytest.importorskip("trl")
LORA = {"method": "lora", "rank": 4, "alpha": 8, "target": {"modules": ["**.q_proj", "**.v_proj"]}}
EDIT = {"method": "loreft", "rank": 2}
IDS = torch.tensor([[5, 6, 7, 8, 9]])
WITHOUT = dict.fromkeys(PEFT)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bases and data, which tests only read."""
    folder = tmp_path_factory.mktemp("trl")
    write_files(folder)
    return folder


@pytest.fixture(autouse=True)
def _here(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in files.iterdir():
        os.symlink(file, tmp_path / file.name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(files / "cache"))


def refused(capsys: pytest.CaptureFixture[str], code: str, *arguments: str) -> Any:
    """Return the error of a command, which must have written nothing."""
    before = sorted(Path().iterdir())
    outcome: Outcome = run_here(capsys, "trl", *arguments, "--json")
    assert outcome.data["error"]["code"] == code, outcome.data
    assert sorted(Path().iterdir()) == before
    return outcome.data["error"]


def test_the_trainers_are_those_of_trl() -> None:
    import trl

    assert [trainer.value for trainer in TrlTrainer] == list(TRAINERS)
    assert all(hasattr(trl, kind) for kind in TRAINERS.values())


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.sample("sft")
@pytest.mark.parametrize("trainer", TRAINERS)
def test_the_same_file_gives_the_losses_and_the_adapter_of_peft(
    trainer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    config = write_config(trainer, tmp_path)
    expected = run_of_trl(trainer, config, tmp_path / "theirs")
    data = run_valid_quietly(capsys, trainer, str(config), "--artifact", "artifact")
    assert data["steps"] == 3 and data["adapter"] and data["out"] == "out"
    assert data["losses"] == pytest.approx(expected, rel=1e-5, abs=1e-6) and len(set(expected)) > 1
    mine, theirs = (load_file(f"{folder}/adapter_model.safetensors") for folder in ("out", "theirs"))
    assert mine.keys() == theirs.keys() and data["trainable"] == sum(tensor.numel() for tensor in theirs.values())
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, rtol=1e-3, atol=1e-5)
    base: Any = graftc.load_base("scoring" if trainer == "reward" else "base")
    compiled: Any = graftc.load("artifact", base)
    ours = compiled(input_ids=IDS).logits
    with torch.no_grad():
        plain = base(input_ids=IDS).logits
        adapted = PeftModel.from_pretrained(base, "out").eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, adapted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, plain, rtol=1e-3, atol=1e-4)


def run_valid_quietly(capsys: pytest.CaptureFixture[str], trainer: str, config: str, *options: str) -> Any:
    """Return what the command prints as JSON, which must conform to its schema; libraries write to stderr."""
    from jsonschema import Draft202012Validator

    from graftc.cli.schemas import published_schema

    outcome = run_here(capsys, "trl", trainer, "--config", config, *options, "--json")
    assert outcome.status == 0, outcome.err
    Draft202012Validator(published_schema("trl")).validate(outcome.data)
    return outcome.data


@pytest.mark.slow
def test_a_spec_takes_the_place_of_pefts_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config("sft", tmp_path, **WITHOUT, graftc_spec={"adapt": [LORA]}, max_steps=9)
    text = run_here(capsys, "trl", "sft", "--config", str(config), "--max_steps", "1")
    assert text.status == 0 and "1,344 elements, 1 step" in text.out and "wrote out: an adapter for PEFT" in text.out
    assert graftc.import_peft("out", graftc.load_base("base")).report.trainable_parameters == 1344


@pytest.mark.slow
def test_a_spec_that_peft_cannot_express_needs_an_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("edit.yaml").write_text(yaml.safe_dump({"adapt": [EDIT]}), encoding="utf-8")
    config = str(write_config("sft", tmp_path, **WITHOUT, max_steps=1))
    assert "--artifact" in refused(capsys, "GC115", "sft", "--config", config, "--spec", "edit.yaml")["hint"]
    data = run_valid_quietly(capsys, "sft", config, "--spec", "edit.yaml", "--artifact", "kept")
    assert not data["adapter"] and data["artifact"] == "kept"
    base: Any = graftc.load_base("base")
    kept, checkpoint = graftc.load("kept", base), graftc.load("out", base)
    torch.testing.assert_close(kept(input_ids=IDS).logits, checkpoint(input_ids=IDS).logits)


@pytest.mark.full
def test_checkpoints_are_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    config = write_config("sft", tmp_path, **changes)
    whole = run_valid_quietly(capsys, "sft", str(config))
    expected = load_file("out/adapter_model.safetensors")
    run_valid_quietly(capsys, "sft", str(config), "--resume_from_checkpoint", "out/checkpoint-2")
    again = load_file("out/adapter_model.safetensors")
    assert whole["steps"] == 3 and all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    for name in ("trainer_state.json", "optimizer.pt", "model.safetensors"):
        file = Path("out/checkpoint-2", name)
        content = file.read_bytes()
        file.write_bytes(content[:20])
        error = refused(capsys, "GC201", "sft", "--config", str(config), "--resume_from_checkpoint", str(file.parent))
        assert "out/checkpoint-2 is a complete checkpoint" in error["hint"]
        file.write_bytes(content)


UNSUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "load_in_4bit": ("sft", {"load_in_4bit": True}),
    "load_in_8bit": ("dpo", {"load_in_8bit": True}),
    "use_liger_kernel": ("sft", {"use_liger_kernel": True}),
    "activation_offloading": ("kto", {"activation_offloading": True}),
    "sync_ref_model": ("dpo", {"sync_ref_model": True, "precompute_ref_log_probs": False}),
    "bf16_full_eval": ("sft", {"bf16_full_eval": True}),
    "gradient_checkpointing_kwargs": ("sft", {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "chat_template_path": ("sft", {"chat_template_path": "scoring"}),
    "model_init_kwargs": ("sft", {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}}),
    "trust_remote_code: true": ("dpo", {"trust_remote_code": True}),
    "model_init_kwargs: trust_remote_code: true": ("sft", {"model_init_kwargs": {"trust_remote_code": True}}),
    "model_init_kwargs: use_safetensors: false": ("sft", {"model_init_kwargs": {"use_safetensors": False}}),
    "use_vllm": ("grpo", {"use_vllm": True, "vllm_mode": "colocate"}),
    "use_transformers_paged": ("rloo", {"use_transformers_paged": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", UNSUPPORTED)
def test_what_no_compiled_model_honours_is_refused_before_anything_is_loaded(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, changes = UNSUPPORTED[key]
    config = write_config(trainer, tmp_path, model_name_or_path="nowhere", dataset_name="nowhere", **changes)
    error = refused(capsys, "GC072", trainer, "--config", str(config))
    assert key in error["message"] and error["hint"].startswith("instead: ")


WRONG: dict[str, tuple[str, str]] = {
    "not YAML": ("use_peft: [", "sft.yaml: "),
    "a list": ("- use_peft\n", "must contain a YAML mapping"),
    "an unknown key": ("lora_rank: 8\nlora_rr: 8\n", "unknown keys lora_rank, lora_rr"),
    "a wrong number": ("lora_r: many\n", "lora_r"),
    "two precisions": ("load_in_4bit: true\nload_in_8bit: true\n", "8 bit and 4 bit"),
    "no adapter": ("model_name_or_path: base\n", "neither use_peft nor a spec"),
    "no model": ("use_peft: true\n", "model_name_or_path is missing"),
    "two adapters": ("model_name_or_path: base\nuse_peft: true\ngraftc_spec: {}\n", "use_peft and a spec"),
    "a rank beside a spec": ("model_name_or_path: base\nlora_r: 4\ngraftc_spec: {}\n", "lora_r has no effect"),
    "environment variables": ("env: {LD_PRELOAD: x}\nuse_peft: true\n", "env would set"),
    "a key twice": ("use_peft: true\nuse_peft: false\n", "use_peft"),
    "aliases of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 10)),
        "more than",
    ),
    "no checkpoint": ("use_peft: true\nresume_from_checkpoint: gone\n", "is not a directory: gone"),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrong", WRONG)
def test_a_config_that_cannot_be_used_is_refused(
    wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = WRONG[wrong]
    (tmp_path / "sft.yaml").write_text(text, encoding="utf-8")
    options = (
        []
        if wrong in ("not YAML", "a list", "environment variables", "a key twice", "aliases of aliases")
        else ["--use_cpu", "--bf16", "False", "--report_to", "none"]
    )
    assert message in refused(capsys, "GC200", "sft", "--config", "sft.yaml", *options)["message"]


@pytest.mark.slow
def test_the_nearest_key_is_proposed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config("sft", tmp_path, lora_aplha=8))
    assert refused(capsys, "GC200", "sft", "--config", config)["hint"] == "did you mean 'lora_alpha'?"
    config = str(write_config("sft", tmp_path))
    assert "num_processes" in refused(capsys, "GC200", "sft", "--config", config, "--num_processes", "2")["message"]
    assert "gone.yaml" in refused(capsys, "GC200", "sft", "--config", "gone.yaml")["message"]


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["dataset_name", "model_name_or_path"])
def test_data_and_models_that_are_missing(gone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config("sft", tmp_path, **{gone: "nowhere/at-all"}))
    outcome = run_here(capsys, "trl", "sft", "--config", config)
    assert outcome.status == 3 and "\nGC201: " in f"\n{outcome.err}" and "Traceback" not in outcome.err


@pytest.mark.slow
def test_settings_that_the_trainer_refuses_when_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are the user's, and no crash to report (GC099)."""
    config = str(write_config("sft", tmp_path, learning_rate=float("nan")))
    outcome = run_here(capsys, "trl", "sft", "--config", config)
    assert "\nGC201: ValueError: Invalid learning rate: nan" in f"\n{outcome.err}"


def test_an_artifact_that_exists_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config("sft", tmp_path, model_name_or_path="nowhere"))
    refused(capsys, "GC063", "sft", "--config", config, "--artifact", "texts")


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["out", "out/artifact", "."])
def test_an_artifact_in_the_output_is_refused_first(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config("sft", tmp_path, model_name_or_path="nowhere"))
    refused(capsys, "GC063", "sft", "--config", config, "--artifact", artifact)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["trl", "peft"])
def test_without_a_package(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(write_config("sft", tmp_path))
    monkeypatch.setitem(sys.modules, package, None)
    assert "graftc[trl]" in refused(capsys, "GC061", "sft", "--config", config)["hint"]


def test_options_come_before_the_file(tmp_path: Path) -> None:
    config = write_config("sft", tmp_path, graftc_artifact="kept")
    settings = read_settings("sft", config, ["--lora_r", "2", "--lora_target_modules", "k_proj"])
    assert (settings.model.lora_r, settings.model.lora_target_modules) == (2, "k_proj")
    assert settings.artifact == Path("kept") and settings.training.learning_rate == 5e-3
    assert read_settings("sft", config, artifact=Path("other")).artifact == Path("other")
