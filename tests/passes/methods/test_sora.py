"""SoRA's gates, its proximal operator and its objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.methods.sora import Prox, shrink
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.kit.training import adamw

ROLES = ["attn.q", "ffn.down"]
SORA = {"method": "sora", "target": {"role": ROLES}, "rank": 6}
QUERY = "bert.encoder.layer.0.attention.self.query"


def gates(compiled: Any) -> dict[str, Tensor]:
    """Every gate by name."""
    return {name: tensor for name, tensor in compiled.adapter_state_dict().items() if name.endswith(".gate")}


def prox_of(compiled: Any) -> Prox:
    """The controller that applies the proximal operator."""
    controller = compiled.steering.controllers["sora"]
    assert isinstance(controller, Prox)
    return controller


@pytest.mark.slow
def test_start() -> None:
    """Gates start standard normal, A within its bound, and B at zero."""
    state = fresh("bert", varied(SORA, ["attn.q", "attn.k", "attn.v"], rank=40)).adapter_state_dict()
    gate = torch.cat([t for name, t in state.items() if name.endswith(".gate")])
    assert abs(float(gate.mean())) < 0.2 and abs(float(gate.std()) - 1) < 0.15
    assert all(not t.any() for name, t in state.items() if name.endswith(".B"))
    assert all(float(t.abs().max()) <= 48**-0.5 for name, t in state.items() if name.endswith(".A"))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral"])
def test_ranks_with_a_gate_at_zero_can_be_removed(family: str) -> None:
    """Whatever the values of their rows and columns, logits stay within 1e-6, and folding agrees."""
    compiled = fresh(family, varied(SORA, ["attn.q", "experts"] if family == "mixtral" else ROLES))
    state = perturb(compiled)
    with torch.no_grad():
        for gate in gates(compiled).values():
            gate[..., [1, 4]] = 0
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    pattern = compiled.rank_pattern("sora")
    assert all(int(live.sum(-1).unique()) == 4 for live in pattern.values())
    with torch.no_grad():
        for name, gate in gates(compiled).items():
            a, b = (state[name.removesuffix("gate") + part] for part in "AB")
            a.mul_((gate != 0)[..., :, None])
            b.mul_((gate != 0)[..., None, :])
    assert largest_difference(outputs_of(compiled, inputs), before) <= 1e-6
    assert largest_difference(outputs_of(compiled.merge(), inputs), before) <= 2e-5


@pytest.mark.slow
def test_the_gate_goes_into_the_weight() -> None:
    """`dW = s B diag(g) A` in float64, which is plain LoRA with the gate absorbed into B."""
    compiled = fresh("bert", varied(SORA, alpha=5))
    state = perturb(compiled)
    a, g, b = (state[f"{QUERY}.graftc.sora.{part}"].double() for part in ("A", "gate", "B"))
    base = tiny("bert").get_parameter(f"{QUERY}.weight").detach().double()
    update = lazy_tensors(compiled.compilation).exact(f"{QUERY}.weight") - base
    torch.testing.assert_close(update, 5 / 6 * (b * g) @ a, rtol=0, atol=1e-14)
    lora = graftc.compile(
        {"adapt": [{"method": "lora", "target": {"role": ROLES}, "rank": 6, "alpha": 5}]}, tiny("bert")
    )
    absorbed = {}
    for name in lora.adapter_state_dict():
        own = name.replace(".lora.", ".sora.")
        absorbed[name] = state[own] * state[own[:-1] + "gate"] if own.endswith(".B") else state[own]
    lora.load_adapter_state_dict(absorbed)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(lora, inputs), outputs_of(compiled, inputs)) <= 1e-5


def test_prox_fixed_points() -> None:
    """The paper's operator gives zero up to the threshold and subtracts it otherwise; that of the reference gives zero
    below twice the threshold. Zero stays zero, and only zero is unchanged.
    """
    gate = torch.tensor([-3.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0])
    paper = shrink(gate, 1.0, zero_below=1.0)
    assert paper.tolist() == [-2.0, -0.5, 0, 0, 0, 0, 0, 0.5, 1.0, 2.0]
    reference = shrink(gate, 1.0, zero_below=2.0)
    assert reference.tolist() == [-2.0, 0, 0, 0, 0, 0, 0, 0, 1.0, 2.0]
    for shrunk in (paper, reference):
        assert torch.equal(shrunk == gate, gate == 0)


def test_prox_minimises_what_it_is_the_operator_of() -> None:
    """The operator gives `argmin |x - g|^2 / 2 + t |x|`, as found on a fine grid."""
    grid = torch.linspace(-2, 2, 40001, dtype=torch.float64)
    for value in (-1.3, -0.2, 0.0, 0.31, 0.9):
        best = grid[((grid - value) ** 2 / 2 + 0.3 * grid.abs()).argmin()]
        shrunk = shrink(torch.tensor(value, dtype=torch.float64), 0.3, zero_below=0.3)
        assert abs(float(best - shrunk)) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("prox", "zeros"), [("paper", 0.1), ("reference", 0.2)])
def test_gates_close_after_each_step(prox: str, zeros: float) -> None:
    """A step without gradients applies the operator alone, to every gate."""
    compiled = fresh("bert", varied(SORA, threshold=0.1, prox=prox))
    before = {name: gate.clone() for name, gate in gates(compiled).items()}
    compiled.after_step()
    for name, gate in gates(compiled).items():
        assert torch.equal(gate == 0, before[name].abs() < zeros)
        moved = (before[name] - gate)[gate != 0]
        torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.1))
    compiled.after_step()
    assert prox_of(compiled).steps == 2


@pytest.mark.full
def test_training_closes_gates() -> None:
    """In a plain loop, a high threshold leaves few ranks, and the pattern counts only these."""
    compiled = fresh("bert", varied(SORA, threshold=0.02))
    optimiser = adamw(compiled, lr=1e-3, weight_decay=0)
    compiled.train()
    for number in range(20):
        compiled(**inputs_for(compiled, seed=number), labels=torch.arange(5) % 3).loss.backward()
        optimiser.step()
        compiled.after_step()
        optimiser.zero_grad()
    left = sum(int(live.sum()) for live in compiled.rank_pattern("sora").values())
    assert 0 < left < 24
    assert left == sum(int((gate != 0).sum()) for gate in gates(compiled).values())


@pytest.mark.full
def test_threshold_schedule() -> None:
    """The threshold moves linearly over the training; GC026 is raised if the training's length is not known."""
    compiled = fresh("bert", varied(SORA, threshold=0.1, final_threshold=0.5))
    with pytest.raises(GraftError) as caught:
        compiled.after_step()
    assert caught.value.code == "GC026"
    compiled.begin(4)
    assert [round(prox_of(compiled).threshold(number), 6) for number in (1, 2, 3, 4)] == [0.2, 0.3, 0.4, 0.5]
    assert prox_of(fresh("bert", varied(SORA, threshold=0.1))).threshold(7) == 0.1


@pytest.mark.slow
def test_l1_objective() -> None:
    """The objective is `l1` times the mean of all absolute gates, with its gradient; by default there is none."""
    compiled = fresh("bert", varied(SORA, l1=0.5))
    every = torch.cat(list(gates(compiled).values()))
    extra = compiled.extra_loss()
    assert abs(extra.item() - 0.5 * float(every.abs().mean())) < 1e-6
    extra.backward()
    for name, parameter in compiled.named_parameters():
        if name.endswith(".gate"):
            torch.testing.assert_close(parameter.grad, 0.5 / every.numel() * parameter.detach().sign())
    assert not fresh("bert", SORA).steering.objectives


@pytest.mark.slow
def test_no_threshold_no_controller() -> None:
    """With threshold 0, gates train freely and no steps are counted."""
    compiled = fresh("bert", varied(SORA, threshold=0))
    assert not compiled.steering.controllers
    assert not [name for name in compiled.adapter_state_dict() if name.endswith("step")]
