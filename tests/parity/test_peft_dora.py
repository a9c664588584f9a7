"""DoRA compared with the installed peft: outputs, gradients and merged outputs, in eval and train mode, of linear maps,
convolutions and tables.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb
from graftc.testing.families import tiny
from tests.kit.comparing import every_tensor
from tests.parity.support import MODULES, Case, Names, check, globs, pair

DORA = Names({"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"})


def case(family: str, **fields: Any) -> Case:
    """DoRA of rank 4 on the modules in `MODULES`."""
    modules = MODULES[family]
    adaptation = {"method": "dora", "target": globs(modules), "rank": 4, "alpha": 6, **fields}
    own = {"fan_in_fan_out": family == "gpt2", "use_rslora": fields.get("rslora", False)}
    return Case(
        family,
        adaptation,
        lambda p: p.LoraConfig(r=4, lora_alpha=6, target_modules=modules, use_dora=True, **own),
        DORA,
    )


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", MODULES)
def test_outputs_gradients_and_merged_outputs(family: str) -> None:
    check(case(family))


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "vit", "gpt_neox"])
@pytest.mark.parametrize("dropout_on", ["input", "branch"])
def test_train_mode_without_dropout(family: str, dropout_on: str) -> None:
    """Gradients agree in the graph of train mode, for families whose configs have no dropout."""
    models = pair(case(family, dropout_on=dropout_on, rslora=True))
    models.ours.train()
    models.theirs.train()
    assert models.gradients() <= 1e-5


@pytest.mark.slow
def test_magnitudes_start_at_pefts() -> None:
    """Magnitudes start at the row norms of the weight, which peft computes from the same squares, rounded elsewhere."""
    peft = pytest.importorskip("peft")
    example = case("gpt2")
    base = tiny("gpt2")
    ours = graftc.compile({"adapt": [dict(example.adaptation)]}, copy.deepcopy(base)).adapter_state_dict()
    peft_tensors = every_tensor(peft.get_peft_model(base, example.config(peft)))
    magnitudes = {name: tensor for name, tensor in ours.items() if name.endswith(".m")}
    assert magnitudes
    for name, tensor in magnitudes.items():
        torch.testing.assert_close(tensor, peft_tensors[DORA.of(name)].flatten(), rtol=1e-6, atol=0)


class Pixels(nn.Module):
    """A table and two convolutions with biases, one of them square and over single points."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.wide = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.point = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map integers ``[batch, 5, 7]`` to ``[batch, 8, 3, 4]``."""
        return self.point(torch.relu(self.wide(self.table(x).movedim(-1, 1))))


@pytest.mark.slow
def test_convolutions_and_a_table() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, x = Pixels(), torch.randint(0, 11, (3, 5, 7))
    names = ["table", "wide", "point"]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, use_dora=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    spec = {"adapt": [{"method": "dora", "target": {"modules": names}, "rank": 3, "alpha": 6}]}
    ours = graftc.compile(spec, copy.deepcopy(base), {"x": x}).eval()
    perturb(ours, 0.1)
    peft_tensors = every_tensor(theirs)
    counterparts: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in ours.named_parameters():
            if tensor.requires_grad:
                table = name.startswith("table.") and not name.endswith(".m")
                key = DORA.of(name) if not table else f"base_model.model.table.lora_embedding_{name[-1]}.default"
                counterparts[name] = peft_tensors[key]
                counterparts[name].copy_(tensor.reshape(counterparts[name].shape))
    assert len(counterparts) == 9
    generator = torch.Generator().manual_seed(0)
    difference = (ours(x) - theirs(x)).detach()
    assert float(difference.abs().max()) <= 1e-5
    assert float((ours(x) - base(x)).detach().abs().max()) > 1e-2
    noise = torch.randn(difference.shape, generator=generator)
    (ours(x) * noise).sum().backward()
    (theirs(x) * noise).sum().backward()
    mine = dict(ours.named_parameters())
    for name, other in counterparts.items():
        a, b = mine[name].grad, other.grad
        assert a is not None and b is not None and bool(a.any())
        assert float((a - b.reshape(a.shape)).abs().max() / a.abs().max().clamp_min(1)) <= 1e-5, name
    merged = ours.merge()(x)
    assert float((merged - theirs.merge_and_unload()(x)).abs().max()) <= 1e-5
