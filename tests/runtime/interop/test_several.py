"""Several PEFT folders imported into one model, or one more into a compiled model: their contributions add up."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.model.runner import runner_of
from graftc.runtime.offered.adapters import Adapters
from graftc.specs.errors.diagnostics import GraftError
from tests.runtime.interop.checkpoints import base, saved

peft = pytest.importorskip("peft")
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs of different ranks and targets, an IA3, and a LoRA that also trains the head."""
    top = tmp_path_factory.mktemp("folders")
    configs = {
        "first": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
        "second": peft.LoraConfig(r=2, lora_alpha=9, target_modules=["q_proj", "down_proj"], use_rslora=True),
        "third": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        "head": peft.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"]),
    }
    for number, (name, config) in enumerate(configs.items()):
        saved(config, "llama", top / name, seed=number)
    return {name: top / name for name in configs}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=IDS).logits
    return values


def theirs(*folders: Path) -> torch.Tensor:
    """Return PEFT's logits with all of the adapters active."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base("llama")), folders[0], adapter_name="0")
        for number, folder in enumerate(folders[1:], 1):
            model.load_adapter(folder, adapter_name=str(number))
        model.base_model.set_adapter([str(number) for number in range(len(folders))])
    return logits(model.eval())


FULL = pytest.mark.full
PAIRS = [
    ("first", "second"),
    pytest.param(("second", "first"), marks=FULL),
    pytest.param(("first", "head"), marks=FULL),
]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", PAIRS)
def test_two_folders_add_up_as_in_peft(chosen: tuple[str, str], folders: dict[str, Path]) -> None:
    own = [folders[name] for name in chosen]
    compiled = graftc.import_peft(own, base("llama"))
    assert [adaptation.name for adaptation in compiled.spec.adapt] == list(chosen)
    assert torch.allclose(logits(compiled), theirs(*own), atol=1e-5)
    with compiled.disabled(chosen[0]):
        if "head" not in chosen:
            assert torch.allclose(logits(compiled), theirs(own[1]), atol=1e-5)


@pytest.mark.slow
def test_names_may_be_given(folders: dict[str, Path]) -> None:
    compiled = graftc.import_peft({"a": folders["first"], "b": folders["third"]}, base("llama"))
    assert [adaptation.name for adaptation in compiled.spec.adapt] == ["a", "b"]
    with compiled.disabled("a"):
        assert torch.allclose(logits(compiled), theirs(folders["third"]), atol=1e-5)


@pytest.mark.full
@pytest.mark.slow
def test_one_more_into_a_compiled_model(folders: dict[str, Path]) -> None:
    compiled = graftc.import_peft(folders["first"], base("llama"))
    before = dict(compiled.named_parameters())
    trained = compiled.load_adapter(folders["second"], "more")
    assert trained and all(".more." in name for name in trained)
    assert all(dict(compiled.named_parameters())[name] is tensor for name, tensor in before.items())
    assert torch.allclose(logits(compiled), theirs(folders["first"], folders["second"]), atol=1e-5)
    compiled.remove("more")
    assert torch.allclose(logits(compiled), theirs(folders["first"]), atol=1e-5)
    compiled.load_adapter(folders["second"])
    assert [str(own.name) for own in compiled.spec.adapt][-1] == "second"


@pytest.mark.slow
def test_what_does_not_go_together_is_named(folders: dict[str, Path]) -> None:
    compiled = graftc.import_peft(folders["first"], base("llama"))
    before = logits(compiled)
    refusals: list[tuple[str, Any]] = [
        ("GC005", lambda: compiled.load_adapter(folders["second"], "lora")),
        ("GC112", lambda: compiled.load_adapter(folders["head"])),
        ("GC002", lambda: compiled.load_adapter(folders["second"], "no name")),
        ("GC110", lambda: compiled.load_adapter(folders["second"] / "nothing")),
        ("GC005", lambda: graftc.import_peft([folders["first"], folders["first"]], base("llama"))),
        ("GC073", lambda: graftc.import_peft([], base("llama"))),
        ("GC073", lambda: graftc.import_peft([folders["first"]], base("llama"), name="default")),
        ("GC112", lambda: graftc.import_peft({"a": folders["head"], "b": folders["head"]}, base("llama"))),
    ]
    for code, call in refusals:
        with pytest.raises(GraftError) as caught:
            call()
        assert caught.value.code == code, caught.value
    assert torch.equal(logits(compiled), before)


@pytest.mark.full
@pytest.mark.slow
def test_a_folder_whose_name_ends_like_rows(folders: dict[str, Path]) -> None:
    """``run`` and ``run_1`` are two adapters, not one adapter with additional rows."""
    named = {"run": folders["first"], "run_1": folders["second"]}
    compiled = graftc.import_peft(named, copy.deepcopy(base("llama")))
    alone = Adapters(runner_of(compiled)).each_alone(list(named))
    assert [[own.name for own in one.compilation.spec.adapt] for one in alone] == [["run"], ["run_1"]]
