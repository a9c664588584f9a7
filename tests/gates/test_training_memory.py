"""The memory that a LoRA step takes on a real decoder, compared with PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import graftc
from benchmarks.train.contestants import PROJECTIONS, ROLES
from benchmarks.train.measure import peak_bytes
from benchmarks.train.models import fill, shared_copy
from graftc.applications.demo.decoder import load_decoder
from tests.kit.comparing import gradients_of

pytestmark = pytest.mark.gate

BATCH, LENGTH, STEPS = 4, 128, 20
CHUNKED: dict[str, Any] = {"loss": "chunked"}


@pytest.fixture(scope="module")
def base() -> Any:
    model = load_decoder().float().requires_grad_(False).train()
    model.config.use_cache = False
    return model


@pytest.fixture(scope="module")
def batches(base: Any) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(base.config.vocab_size, (STEPS, BATCH, LENGTH), generator=generator)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids} for ids in rows]


def theirs(base: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    return peft.get_peft_model(shared_copy(base), config).train()


def ours(base: Any, batch: Any, **memory: Any) -> Any:
    adaptation = {"method": "lora", "target": {"role": ROLES}, "rank": 8, "alpha": 16}
    return graftc.compile({"adapt": [adaptation], "memory": memory}, shared_copy(base), batch).train()


def losses(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[list[float], int]:
    """Return the losses of training and the memory peak of one more step."""
    fill(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    values = []

    def step(batch: dict[str, torch.Tensor]) -> None:
        loss = model(**batch).loss
        values.append(float(loss))
        loss.backward()

    for batch in batches:
        step(batch)
        optimiser.step()
        optimiser.zero_grad()
    return values, peak_bytes(lambda: step(batches[0]))


@pytest.fixture(scope="module")
def peers(base: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[list[float], int]:
    return losses(theirs(base), batches)


@pytest.mark.parametrize(("memory", "most"), [(CHUNKED, 0.6), ({**CHUNKED, "budget": 0.4}, 0.5)])
def test_less_than_peft_with_the_same_losses(
    base: Any, batches: list[dict[str, torch.Tensor]], peers: tuple[list[float], int], memory: Any, most: float
) -> None:
    model = ours(base, batches[0], **memory)
    values, peak = losses(model, batches)
    expected, peer = peers
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)
    assert peak < most * peer, f"{peak / peer:.3f} of {peer / 1e6:.0f} MB"
    predicted = model.activations(**batches[0]).peak
    assert predicted == pytest.approx(peak, rel=0.05)


def test_gradients_are_those_of_the_plain_graph(base: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """Gradients are equal in float64, with every option that changes how a step runs."""
    wide = copy.deepcopy(base).double()
    adaptation = {"method": "lora", "target": {"role": ROLES}, "rank": 8, "alpha": 16}
    batch = {name: tensor[:1, :32] for name, tensor in batches[0].items()}

    def gradients(**document: Any) -> dict[str, torch.Tensor]:
        model = graftc.compile({"adapt": [adaptation], **document}, shared_copy(wide), batch).train()
        fill(model)
        model(**batch).loss.backward()
        return gradients_of(model)

    plain = gradients(optimise={"off": ["projections", "recompute"]})
    for other in (gradients(), gradients(memory={"budget": 0.3})):
        for name, expected in plain.items():
            assert float((other[name] - expected).norm() / expected.norm()) < 1e-10, name
