"""Factors of experts, which PEFT stored in the other order up to 0.18: recognised by sizes, then by `peft_version`."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from tests.runtime.interop.checkpoints import base

peft = pytest.importorskip("peft")

HIDDEN = 16
IDS = torch.arange(12).reshape(2, 6) % 40
BOTH, DOWN, UP = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["experts.down_proj"], ["experts.gate_up_proj"]


def mixtral(width: int) -> Any:
    """Return a model whose experts have weights ``[3, 2 * width, 16]`` and ``[3, 16, width]``."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": width, "num_hidden_layers": 1, "vocab_size": 40}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=3)).requires_grad_(False).eval()


def written(model: nn.Module, path: Path, targets: list[str], older: bool, version: str | None) -> Tensor:
    """Write a folder with a random adapter in one of the layouts, and return PEFT's logits with it.

    What releases up to 0.18 did with every weight, later ones do if the module declares its weights as transposed.
    """
    wrapped = copy.deepcopy(model)
    experts = [module for path, module in wrapped.named_modules() if path.endswith(".experts")]
    assert experts and not any(getattr(module, "is_transposed", False) for module in experts)
    with pytest.MonkeyPatch.context() as patch:
        for module in experts:
            patch.setattr(module, "is_transposed", older, raising=False)
        config = peft.LoraConfig(r=2, lora_alpha=7, target_parameters=targets, target_modules=["q_proj"])
        adapted = peft.get_peft_model(wrapped, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        logits: Tensor = adapted(input_ids=IDS).logits
    adapted.save_pretrained(path)
    about = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**about, "peft_version": version}))
    return logits


def logits_of(path: Path, model: nn.Module) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits: Tensor = graftc.import_peft(path, model)(input_ids=IDS).logits
    return logits


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.sample("True-None-24-targets0")
@pytest.mark.parametrize(("width", "targets"), [(24, BOTH), (24, DOWN), (16, BOTH), (16, UP), (8, BOTH), (8, DOWN)])
@pytest.mark.parametrize("version", [None, "0.18.1", "0.21.2"])
@pytest.mark.parametrize("older", [False, True])
def test_sizes_tell(width: int, targets: list[str], version: str | None, older: bool, tmp_path: Path) -> None:
    """One weight that is not square determines the layout, and sizes take precedence over everything else."""
    model = mixtral(width)
    expected = written(model, tmp_path, targets, older, version)
    assert (expected - model(input_ids=IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(tmp_path, model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.sample("1.0.0-False-16-targets0")
@pytest.mark.slow
@pytest.mark.parametrize(("width", "targets"), [(16, DOWN), (8, UP)])
@pytest.mark.parametrize(
    ("version", "older"), [("0.17.0", True), ("0.18.1", True), ("0.19.0", False), ("1.0.0", False)]
)
def test_the_release_tells(width: int, targets: list[str], version: str, older: bool, tmp_path: Path) -> None:
    model = mixtral(width)
    expected = written(model, tmp_path, targets, older, version)
    torch.testing.assert_close(logits_of(tmp_path, model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.sample("None-16-targets0", "newest-8-targets1", "0.18.1.dev0-8-targets1")
@pytest.mark.slow
@pytest.mark.parametrize(("width", "targets"), [(16, DOWN), (8, UP)])
@pytest.mark.parametrize("version", [None, "0.18.1.dev0", "0.19.0.dev0@0123abc", "newest"])
def test_nothing_tells(width: int, targets: list[str], version: str | None, tmp_path: Path) -> None:
    model = mixtral(width)
    written(model, tmp_path, targets, False, version)
    with pytest.raises(GraftError) as caught:
        graftc.import_peft(tmp_path, model)
    assert caught.value.code == "GC113"
    assert "up to 0.18" in caught.value.message and "from 0.19 on" in caught.value.message
    assert caught.value.place is not None and caught.value.place.path == "peft_version"


@pytest.mark.full
def test_an_export_tells(tmp_path: Path) -> None:
    model = mixtral(16)
    written(model, tmp_path / "given", DOWN, True, "0.18.1")
    compiled = graftc.import_peft(tmp_path / "given", model)
    compiled.export(tmp_path / "made", "peft")
    again = graftc.import_peft(tmp_path / "made", model)
    torch.testing.assert_close(again(input_ids=IDS).logits, compiled(input_ids=IDS).logits)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "made").eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS).logits
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("name", ["c_attn.weight", "attn.c_proj.weight"])
def test_a_stored_matrix_that_a_config_names_itself(name: str, tmp_path: Path) -> None:
    """PEFT takes any two axes for ``[out, in]``, including those of ``Conv1D``, whose weights are ``[in, out]``."""
    model = base("gpt2")
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=[], target_parameters=[name])
    ).eval()
    torch.manual_seed(0)
    for key, tensor in theirs.named_parameters():
        if "lora_" in key:
            nn.init.normal_(tensor, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    compiled = graftc.import_peft(tmp_path / "theirs", copy.deepcopy(model)).eval()
    ids = torch.randint(3, 90, (2, 6))
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits
        torch.testing.assert_close(compiled(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
        compiled.export(tmp_path / "ours", format="peft")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(GraftError) as caught:
        graftc.merge_checkpoint(tmp_path / "theirs", tmp_path / "base", tmp_path / "merged")
    assert caught.value.code == "GC103" and not (tmp_path / "merged").exists()
