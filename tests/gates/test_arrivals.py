"""A folder that transformers saved of a bitsandbytes model trains like its dequantised weights."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import graftc
from graftc.passes.core.packing.modules import packed_weights
from graftc.passes.core.packing.packed_tensor import dense as dense_value
from tests.runtime.sources.quantised.test_arrivals import llama

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.gate

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
STEPS = 20


def batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    return itertools.cycle([torch.randint(3, 90, (4, 12), generator=generator) for _ in range(4)])


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_nf4_trains_as_peft_on_dequantised_weights(double: bool, ours: bool, tmp_path: Path) -> None:
    """Training on NF4 equals training with peft on the weights that ``dequantize_4bit`` gives.

    The adapter of peft is loaded here and gradients are compared; after 20 steps the exported adapter is loaded in
    peft.
    """
    llama().save_pretrained(tmp_path / "dense")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=options, device_map="cpu"
    ).save_pretrained(tmp_path / "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu")
    weights = {
        f"{path}.weight": bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for path, module in theirs.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    plain = llama()
    plain.load_state_dict({**plain.state_dict(), **weights})
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    judge = peft.get_peft_model(plain, config)
    judge.save_pretrained(tmp_path / "peft")

    base: Any = graftc.load_base(tmp_path / "nf4") if ours else theirs
    compiled: Any = graftc.import_peft(tmp_path / "peft", base)
    packed = packed_weights(compiled.compilation.source)
    assert packed.keys() == weights.keys()
    assert all(torch.equal(dense_value(packed[name]), weight) for name, weight in weights.items())

    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2) for model in (compiled, judge)
    ]
    losses = []
    for step, ids in zip(range(STEPS), batches(), strict=False):
        step_losses = [model.train()(input_ids=ids, labels=ids).loss for model in (compiled, judge)]
        for loss in step_losses:
            loss.backward()
        if not step:
            own = sorted(p.grad.flatten().tolist() for p in compiled.parameters() if p.requires_grad)
            other = sorted(p.grad.flatten().tolist() for p in judge.parameters() if p.requires_grad)
            assert len(own) == len(other) == 2 * 2 * len(TARGETS)
            assert max(abs(a - b) for x, y in zip(own, other, strict=True) for a, b in zip(x, y, strict=True)) < 1e-6
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(step_losses[0].item())
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.4

    compiled.export(tmp_path / "written", format="peft")
    ids = next(batches())
    for dense in (True, False):
        fresh = llama()
        fresh.load_state_dict({**fresh.state_dict(), **weights})
        holder = fresh if dense else AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", device_map="cpu")
        again = peft.PeftModel.from_pretrained(holder, tmp_path / "written")
        again = again.eval() if dense else again.train()  # in eval mode its CPU kernel rounds scales
        with torch.no_grad():
            assert torch.allclose(again(input_ids=ids).logits, compiled.eval()(input_ids=ids).logits, atol=1e-5)
