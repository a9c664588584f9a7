"""Packed weights of models that run their own Python between graphs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import graftc
from graftc.passes.core.packing.modules import packed_weights
from graftc.passes.core.packing.packed_tensor import dense
from graftc.testing import perturb
from tests.kit.models import adapted, fresh
from tests.kit.packed_bases import in_4_bits
from tests.runtime.live.models import Case, looping, qwen2_vl
from tests.runtime.sources.quantised.writers import FORMATS, write

LORA: dict[str, Any] = {"method": "lora", "rank": 4, "target": {"regex": r".*\.(q_proj|v_proj|qkv|up)"}}


def plain_values(compiled: Any, like: nn.Module) -> Any:
    """Return a copy of a model with the values of a compiled model's packed weights."""
    plain = copy.deepcopy(like)
    values = {name: dense(packed) for name, packed in packed_weights(compiled.compilation.source).items()}
    plain.load_state_dict({**plain.state_dict(), **values})
    return plain


@pytest.mark.full
@pytest.mark.sample("spec")
@pytest.mark.slow
@pytest.mark.parametrize("by", ["spec", "bitsandbytes"])
def test_it_trains_as_peft_on_bitsandbytes(by: str, tmp_path: Path) -> None:
    """Vision blocks run as Python between graphs of their maps, and layers of the language model as graphs."""
    import peft

    case = qwen2_vl(128)  # rows of whole blocks, see `in_4_bits`
    maps = {path for path, module in case.model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    theirs: Any = in_4_bits(case.model, maps)
    ours, options = (case.model, {"base": {"quantize": "nf4"}}) if by == "spec" else (theirs, {})
    compiled = fresh(ours, LORA, inputs=case.first, seed=0, cache=False, **options)
    assert {name.rpartition(".")[0] for name in packed_weights(compiled.compilation.source)} == maps
    compiled.export(tmp_path / "peft", format="peft")
    config = peft.LoraConfig.from_pretrained(tmp_path / "peft")
    config.inference_mode = False
    judge = peft.get_peft_model(theirs, config)
    start = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert not peft.set_peft_model_state_dict(judge, start).unexpected_keys
    models = (compiled, judge)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 5e-3) for m in models]
    losses = []
    for step in range(20):
        each = [model.train()(**(case.second if step % 2 else case.first)).loss for model in models]
        for loss, optimizer in zip(each, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert max(each) - min(each) < 1e-5
        losses.append(each[0].item())
    assert losses[-1] < losses[1] - 0.05

    plain = plain_values(compiled, case.model)
    updated = {path: m for path, m in judge.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert len(updated) == 6
    for path, module in updated.items():
        plain.get_submodule(path).weight.data += module.get_delta_weight("default").detach()
    merged = compiled.eval().merge(base="full")
    merged.save(tmp_path / "merged")
    again = type(case.model).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        wanted = plain(**case.second).logits
        for model in (compiled, merged, merged.to_transformers(), again):
            torch.testing.assert_close(model(**case.second).logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.full
@pytest.mark.sample("nf4-looping")
@pytest.mark.slow
@pytest.mark.parametrize("make", [looping, qwen2_vl], ids=["looping", "qwen2_vl"])
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_it_computes_with_the_packed_values(make: Any, kind: str, tmp_path: Path) -> None:
    case: Case = make()
    entry = {**LORA, "init": "loftq"} if kind == "nf4" else LORA
    compiled = adapted(case.model, entry, inputs=case.first, cache=False, base={"quantize": kind})
    plain = plain_values(compiled, case.model)
    with compiled.disabled():
        assert torch.equal(results(compiled, case), results(plain, case))
    compiled.save(tmp_path / "adapter")
    for base in (case.model, compiled.compilation.source):
        assert torch.equal(results(graftc.load(tmp_path / "adapter", base).eval(), case), results(compiled, case))
    merged = compiled.merge(base="full")
    plain.load_state_dict(merged.folded_state_dict(), strict=False)  # with buffers that are not persistent
    torch.testing.assert_close(results(merged, case), results(compiled, case), atol=1e-5, rtol=0)
    torch.testing.assert_close(results(merged, case), results(plain, case))
    again = compiled.merge(base="requantized", budget=1e3, allow_unchanged=True)
    assert again.certificate.requantised and packed_weights(again._graftc.live.model)
    torch.testing.assert_close(results(again, case), results(merged, case), atol=0.5, rtol=0)


def results(model: Any, case: Case) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(**case.second)
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


@pytest.mark.full
@pytest.mark.parametrize("name", ["gptq 4", "awq", "fp8 blocks"])
def test_folders_of_quantised_models(name: str, tmp_path: Path) -> None:
    case = qwen2_vl(128)
    dtype, writer, options = FORMATS[name]
    rounded = copy.deepcopy(case.model).to(dtype)
    values = write(tmp_path, rounded, writer, options)
    base: Any = graftc.load_base(tmp_path, dtype=torch.float32)
    compiled = fresh(base, LORA, inputs=case.first, cache=False).eval()
    plain = copy.deepcopy(case.model)
    plain.load_state_dict({**rounded.state_dict(), **values})
    torch.testing.assert_close(
        results(compiled, case), results(plain, case), atol=2e-2 if "fp8" in name else 1e-5, rtol=0
    )
    perturb(compiled)
    merged = compiled.merge(base="full")
    torch.testing.assert_close(results(merged, case), results(compiled, case), atol=1e-5, rtol=0)
