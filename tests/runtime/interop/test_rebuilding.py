"""A merged model becomes an instance of its class only if the class builds what the live model runs."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, tiny

IDS = torch.tensor([[3, 7, 5, 20, 11]])
SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}


class Doubled(nn.RMSNorm):
    """A norm with the tensors of Llama's and other outputs."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def merged_of(model: Any) -> Any:
    compiled: Any = graftc.compile(SPEC, model.eval()).eval()
    perturb(compiled)
    return compiled.merge()


def replaced() -> Any:
    model = tiny("llama")
    norm = Doubled(model.model.norm.weight.shape)
    norm.weight = model.model.norm.weight
    model.model.norm = norm
    return model


def redirected() -> Any:
    model = tiny("llama")
    norm = model.model.norm
    plain = norm.forward
    norm.forward = types.MethodType(lambda self, x: 2 * plain(x), norm)
    return model


def with_epsilon(model: Any) -> None:
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5


def with_scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


def with_bias(model: Any) -> None:
    down = model.model.layers[0].mlp.down_proj
    down.bias = nn.Parameter(torch.ones(down.out_features))


def with_other_config(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_epsilon, "variance_epsilon of model.layers.1.input_layernorm"),
        (with_scaling, "scaling of model.layers.0.self_attn"),
        (with_bias, "bias of model.layers.0.mlp.down_proj"),
        (with_other_config, "variance_epsilon of model.layers.0.input_layernorm"),
    ],
)
def test_other_settings_are_refused(change: Any, named: str) -> None:
    """The class builds modules from its config alone, so what was set on a module afterwards would be lost."""
    model = tiny("llama")
    change(model)
    with pytest.raises(GraftError, match=re.escape(f"GC052: {named} was changed")):
        merged_of(model).to_transformers()


def test_state_of_training_is_no_setting() -> None:
    model = tiny("llama").train()
    model.gradient_checkpointing_enable()
    merged = merged_of(model)
    torch.testing.assert_close(merged.to_transformers()(IDS).logits, merged(IDS).logits)


@pytest.mark.slow
def test_numbers_that_repeat_what_tensors_show_are_no_settings() -> None:
    """Resizing tables leaves the old number of tokens on Llama's stack of layers."""
    model: Any = tiny("llama")
    model.resize_token_embeddings(110)
    merged = merged_of(model)
    torch.testing.assert_close(merged.to_transformers()(IDS).logits, merged(IDS).logits)


@pytest.mark.slow
def test_what_a_class_changes_itself_is_allowed() -> None:
    """BigBird's own forward replaces its attention by blocks if a text is short."""
    sizes = {"vocab_size": 101, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.BigBirdConfig(**sizes, num_attention_heads=2, block_size=4, num_random_blocks=1)
    model = transformers.BigBirdForSequenceClassification(config).eval()
    attention = model.bert.encoder.layer[0].attention
    before = type(attention.self)
    model(IDS)
    assert type(attention.self) is not before
    merged = merged_of(model)
    torch.testing.assert_close(merged.to_transformers()(IDS).logits, merged(IDS).logits)


@pytest.mark.parametrize("changed", [replaced, redirected])
def test_other_code_is_refused(changed: Any, tmp_path: Path) -> None:
    """Neither a model nor a folder is made, and the graph is exported as it is."""
    merged = merged_of(changed())
    with pytest.raises(GraftError, match=r"GC052: model\.norm is a \w+ that runs other code") as caught:
        merged.to_transformers()
    assert "ONNX" in str(caught.value.hint)
    with pytest.raises(GraftError, match="GC052"):
        merged.save(tmp_path / "merged")
    assert not any(tmp_path.iterdir())
    path = merged.export(tmp_path / "model.onnx", format="onnx")
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    session = onnxruntime.InferenceSession(str(path))
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(logits), merged(**inputs).logits, rtol=0, atol=1e-4)


def test_wrappers_of_accelerate_run_the_same_code() -> None:
    """Accelerate's hooks replace every module's ``forward``, and move tensors only."""
    from accelerate import dispatch_model

    model = tiny("llama")
    expected = merged_of(tiny("llama")).to_transformers()(input_ids=IDS).logits
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model)
    torch.testing.assert_close(merged_of(model).to_transformers()(input_ids=IDS).logits, expected, rtol=0, atol=1e-6)


def with_hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)


def with_hook_before(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def with_hook_on_the_model(model: Any) -> None:
    model.register_forward_hook(lambda module, args, output: type(output)(logits=output.logits + 1))


def with_other_ties(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(1.5 * model.lm_head.weight.detach())


def with_call(model: Any) -> None:
    norm = model.model.norm

    class Called(type(norm)):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            return 2 * super().__call__(x)

    norm.__class__ = Called


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", with_hook),
        ("llama", with_hook_before),
        ("llama", with_hook_on_the_model),
        ("gpt2", with_other_ties),
        ("llama", with_call),
    ],
)
def test_what_only_a_run_shows_is_refused(name: str, change: Any, tmp_path: Path) -> None:
    """Hooks and ties are in no file: the graph contains them, but a model that the class builds does not."""
    model = tiny(name)
    change(model)
    compiled: Any = graftc.compile({"adapt": [{"method": "bitfit"}]} if name == "gpt2" else SPEC, model.eval()).eval()
    perturb(compiled)
    merged = compiled.merge()
    with pytest.raises(GraftError, match="GC052"):
        merged.to_transformers()
    with pytest.raises(GraftError, match="GC052"):
        merged.save(tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_a_buffer_that_no_file_stores_is_refused(tmp_path: Path) -> None:
    """In memory, the buffer is the live model's own, so only the folder differs."""
    model = tiny("llama")
    model.model.rotary_emb.inv_freq *= 0.5
    merged = merged_of(model)
    torch.testing.assert_close(merged.to_transformers()(IDS).logits, merged(IDS).logits)
    with pytest.raises(GraftError, match="GC052: the LlamaForCausalLM that transformers loads from the merged folder"):
        merged.save(tmp_path / "merged")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_buffers_that_were_rounded_with_the_model_are_allowed(dtype: torch.dtype, tmp_path: Path) -> None:
    """``model.to`` rounds rotary frequencies as well, which a merge in float32 shows; loading computes them anew."""
    model = tiny("llama").to(dtype).eval()
    compiled: Any = graftc.compile(SPEC, model).eval()
    perturb(compiled)
    merged = compiled.merge(dtype=torch.float32)
    loaded: Any = type(model).from_pretrained(merged.save(tmp_path / "merged"))
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits, rtol=0, atol=0.05)
    frequencies = model.model.rotary_emb.inv_freq
    frequencies[1] *= 1.02
    compiled = graftc.compile(SPEC, model).eval()
    perturb(compiled)
    with pytest.raises(GraftError, match="GC052"):
        compiled.merge(dtype=torch.float32).save(tmp_path / "other")


def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    """The config describes a larger vocabulary than the live model has."""
    model = tiny("llama")
    model.config.vocab_size += 8
    with pytest.raises(GraftError, match="GC052"):
        merged_of(model).save(tmp_path / "merged")
    assert not any(tmp_path.iterdir())


def test_hooks_that_change_nothing_are_allowed(tmp_path: Path) -> None:
    model, seen = tiny("llama"), []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    merged = merged_of(model)
    expected = merged(IDS).logits
    torch.testing.assert_close(merged.to_transformers()(IDS).logits, expected)
    loaded: Any = type(model).from_pretrained(merged.save(tmp_path / "merged"))
    torch.testing.assert_close(loaded(IDS).logits, expected)
    assert seen


def test_a_model_of_another_attention_is_compared_with_its_own(tmp_path: Path) -> None:
    """The folder does not say which kernels to use, so they are those of the live model for the comparison."""
    model = tiny("llama")
    model.set_attn_implementation("eager")
    merged = merged_of(model)
    assert merged.to_transformers().config._attn_implementation == "eager"
    loaded: Any = type(model).from_pretrained(merged.save(tmp_path / "merged"))
    torch.testing.assert_close(loaded(IDS).logits, merged(IDS).logits)
