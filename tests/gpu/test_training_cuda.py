"""Mixed precision on a CUDA device: the Trainer's, and bases in 16 bits with a gradient scaler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftc
from graftc.testing import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPEC = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "rank": 4}]}


def texts(count: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of tokens with their labels."""
    rows = torch.randint(5, 90, (count, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_trainer(precision: str, tmp_path: Path) -> None:
    """With autocast over a base in float32, all parameters move and stay float32, and losses are near float32's."""
    from transformers import Trainer, TrainingArguments

    losses = {}
    for chosen in (precision, None):
        torch.manual_seed(0)
        compiled = graftc.compile(SPEC, tiny("llama"))
        start = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
        options = {chosen: True} if chosen else {}
        arguments = TrainingArguments(
            str(tmp_path), max_steps=6, logging_steps=1, learning_rate=1e-2, report_to=[], save_strategy="no", **options
        )
        trainer = Trainer(model=compiled, args=arguments, train_dataset=texts(48))
        trainer.train()
        losses[chosen] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        tensors = compiled.adapter_state_dict()
        assert all(t.dtype == torch.float32 and not torch.equal(t.cpu(), start[n].cpu()) for n, t in tensors.items())
    assert losses[precision] == pytest.approx(losses[None], rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_16_bits(dtype: torch.dtype) -> None:
    """Factors and gradients are float32, which a scaler needs, and the fold is certified."""
    compiled = graftc.compile(SPEC, tiny("llama").to(dtype).cuda()).train()
    trained = [p for p in compiled.parameters() if p.requires_grad]
    optimiser, scaler = torch.optim.AdamW(trained, lr=1e-2), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(6):
        ids = torch.stack([row["input_ids"] for row in texts(8)]).cuda()
        loss = compiled(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert compiled.eval().merge().certificate.passed
