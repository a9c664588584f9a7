"""Controllers, objectives and random draws on a CUDA device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.testing import tiny
from graftc.testing.compare import inputs_for
from tests.kit.training import adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TARGET = {"role": ["attn.q", "ffn.down"]}
METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "target_rank": 2},
    "sora": {"rank": 4, "threshold": 0.02, "l1": 0.1},
    "dylora": {"rank": 4},
    "child_tuning": {},
}


@pytest.mark.parametrize("moved", [False, True], ids=["compiled there", "moved there"])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_on_the_device(method: str, moved: bool) -> None:
    """State is on the parameters' device, steps work there, and the result folds."""
    entry = {"method": method, "target": TARGET, **METHODS[method]}
    model = tiny("bert")
    compiled = graftc.compile({"adapt": [entry]}, model if moved else model.cuda()).cuda()
    optimiser = adamw(compiled, lr=1e-2)
    compiled.begin(6)
    compiled.train()
    for number in range(6):
        inputs = {name: value.cuda() for name, value in inputs_for(compiled, seed=number).items()}
        loss = compiled(**inputs, labels=torch.arange(5, device="cuda") % 3).loss + compiled.extra_loss()
        loss.backward()
        optimiser.step()
        compiled.after_step()
        optimiser.zero_grad()
    assert all(tensor.is_cuda for tensor in compiled.adapter_state_dict().values())
    if method == "adalora":
        assert sum(int(live.sum()) for live in compiled.rank_pattern(method).values()) == 8
    compiled.eval()
    assert compiled.merge().certificate.passed
