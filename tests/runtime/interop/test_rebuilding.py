"""A merged model becomes an instance of its class only if the class builds what the live model runs."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
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
