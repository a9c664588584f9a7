"""A text adapter under the names of a vision-language model, and back: the same update, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftc.records.conversion import RenamedMaps
from graftc.runtime.interop.layouts.convert import AdapterSource, ConvertedFolder, convert_folder
from graftc.runtime.interop.layouts.renaming import Rule
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.support import run_here
from tests.runtime.interop.adapters import written

SIZES = {
    **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
}
VISION = {
    **{"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 28, "patch_size": 14, "model_type": "clip_vision_model", "projection_dim": 32},
}
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]


def llava(**vision: Any) -> nn.Module:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config={**VISION, **vision}, image_token_index=90)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()


def text_of(wrapper: Any) -> nn.Module:
    """Return the language model of a wrapper as a model of its own, with the same weights."""
    from transformers import LlamaForCausalLM

    text: Any = LlamaForCausalLM(wrapper.config.text_config).eval()
    text.model.load_state_dict(wrapper.model.language_model.state_dict())
    text.lm_head.load_state_dict(wrapper.lm_head.state_dict())
    return text  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wrapper, its language model, and an adapter of each."""
    folder, wrapper = tmp_path_factory.mktemp("wrapped"), llava()
    wrapper.save_pretrained(folder / "wrapper")
    text_of(wrapper).save_pretrained(folder / "text")
    written(text_of(wrapper), folder / "adapter", target_modules=TARGETS)
    return folder


def onto(adapter: Path, out: Path | None, model: Path, base: Path | None, to: str = "peft") -> ConvertedFolder:
    return convert_folder(AdapterSource.of(adapter, model=base), out, to, onto=model)


def logits(model: nn.Module, adapter: Path) -> Tensor:
    from peft import PeftModel

    ids = torch.arange(12).reshape(2, 6) + 2
    loaded = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return loaded(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.slow
def test_there_and_back(folders: Path, tmp_path: Path) -> None:
    """PEFT computes the same with the adapter in the wrapper; the way back gives the same files."""
    there = onto(folders / "adapter", tmp_path / "there", folders / "wrapper", folders / "text")
    assert there.renamed == (
        RenamedMaps("model", "model.language_model", 6, "values"),
        RenamedMaps("", "", 1, "values"),
    )
    assert there.largest_error < 1e-12 and all(site.site.startswith(("model.lang", "lm_head")) for site in there.sites)
    assert torch.allclose(logits(text_of(llava()), folders / "adapter"), logits(llava(), tmp_path / "there"), atol=1e-5)
    config = json.loads((tmp_path / "there/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders / "wrapper")
    back = onto(tmp_path / "there", tmp_path / "back", folders / "text", None)
    assert back.renamed[0] == RenamedMaps("model.language_model", "model", 6, "values")
    one, other = (load_file(p / "adapter_model.safetensors") for p in (folders / "adapter", tmp_path / "back"))
    del one["base_model.model.lm_head.base_layer.weight"]  # PEFT's copy of the base's own
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_without_the_base(folders: Path, tmp_path: Path) -> None:
    """The adapter's sizes decide if they fit one place alone; the wrapper's own folder has no text model's names."""
    config = folders / "adapter/adapter_config.json"
    for base in (None, str(folders / "wrapper")):
        adapter = tmp_path / f"adapter{base is None}"
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(
            (folders / "adapter/adapter_model.safetensors").read_bytes()
        )
        fields = {**json.loads(config.read_text()), "base_model_name_or_path": base}
        (adapter / "adapter_config.json").write_text(json.dumps(fields))
        found = onto(adapter, None, folders / "wrapper", None)
        assert [own.proof for own in found.renamed] == ["sizes", "sizes"] and found.out is None


@pytest.mark.slow
def test_what_could_be_either(folders: Path, tmp_path: Path) -> None:
    """With a tower of the same sizes and names, only the weights decide."""
    twin = llava(hidden_size=32, intermediate_size=48)
    twin.save_pretrained(tmp_path / "twin")
    text_of(twin).save_pretrained(tmp_path / "text")
    written(text_of(twin), tmp_path / "adapter", target_modules=["q_proj"])
    config = tmp_path / "adapter/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(GraftError, match="could be") as caught:
        onto(tmp_path / "adapter", None, tmp_path / "twin", None)
    assert caught.value.code == "GC069" and "vision_tower" in caught.value.message and "--model" in str(caught.value)
    found = onto(tmp_path / "adapter", None, tmp_path / "twin", tmp_path / "text")
    assert [own.new for own in found.renamed] == ["model.language_model"]


def changed(folder: Path, change: Callable[[Any], None]) -> Path:
    model = llava()
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_what_is_refused(folders: Path, tmp_path: Path) -> None:
    """Other weights, maps that the model lacks, and layers that it does not have."""
    other = changed(tmp_path / "other", lambda m: m.model.language_model.layers[1].mlp.down_proj.weight.mul_(1.001))
    with pytest.raises(
        GraftError, match=r"weights differ at 1 adapted tensor: model\.layers\.1\.mlp\.down_proj"
    ) as caught:
        onto(folders / "adapter", tmp_path / "out", other, folders / "text")
    assert caught.value.code == "GC069" and not (tmp_path / "out").exists()
    seeing = written(llava(), tmp_path / "seeing", target_modules=["q_proj"])
    with pytest.raises(GraftError, match=r"has no map for 2 maps of the adapter: model\.vision_tower") as caught:
        onto(seeing, None, folders / "text", folders / "wrapper")
    assert caught.value.code == "GC069"
    longer = written(llava(), tmp_path / "longer", target_modules=["down_proj"])
    tensors = load_file(longer / "adapter_model.safetensors")
    moved = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}
    save_file(moved, longer / "adapter_model.safetensors")
    with pytest.raises(GraftError, match=r"model\.language_model\.layers\.7\.mlp\.down_proj"):
        onto(longer, None, folders / "text", None)


def test_prefixes() -> None:
    assert Rule("model", "model.language_model").applied("model.layers.0.q") == "model.language_model.layers.0.q"
    assert Rule("model.language_model", "model").applied("model.language_model.norm") == "model.norm"
    assert Rule("language_model", "").applied("language_model.lm_head") == "lm_head"
    assert Rule("", "language_model").applied("lm_head") == "language_model.lm_head"


@pytest.mark.slow
def test_on_the_command_line(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(folders / "adapter"), "--onto", str(folders / "wrapper"), "--model", str(folders / "text")]
    outcome = run_here(capsys, *words, "--out", str(tmp_path / "out"))
    assert outcome.status == 0 and "model.language_model, 6 maps, by values" in outcome.out
    found = run_here(capsys, *words, "--dry-run", "--json").data["renamed"]
    assert found[0] == {"old": "model", "new": "model.language_model", "maps": 6, "proof": "values"}
    gguf = run_here(capsys, *words, "--to", "gguf", "--out", str(tmp_path / "x.gguf"), "--json").data["error"]
    assert gguf["code"] == "GC090" and "--onto" in gguf["message"]
