"""``copy.deepcopy``, as for averages of weights and reference models: the same model with tensors of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from graftc.specs.errors.diagnostics import GraftWarning
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import every_tensor
from tests.kit.models import adapted

ROLES = {"role": ["attn.q", "ffn.down"]}
LORA = {"name": "low", "method": "lora", "target": ROLES, "rank": 3, "dropout": 0.1}
DORA = {"name": "rows", "method": "dora", "target": ROLES, "rank": 3}
SORA = {"name": "gates", "method": "sora", "target": ROLES, "rank": 3, "threshold": 0.05, "l1": 0.1}


@pytest.mark.slow
@pytest.mark.sample("gpt2")
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_copy_computes_the_same_and_shares_no_tensor(family: str) -> None:
    """In both modes, ties and frozen tensors are kept, and changing one model leaves the other unchanged."""
    compiled = adapted(family, LORA, DORA, noise=0.1, **{"train": ["classifier"]} if family == "bert" else {})
    copied = copy.deepcopy(compiled)
    assert type(copied) is type(compiled)
    assert copied.state_dict().keys() == compiled.state_dict().keys()
    own, other = every_tensor(compiled), every_tensor(copied)
    assert own.keys() == other.keys()
    places: dict[int, set[int]] = {}
    for name, tensor in own.items():
        assert other[name].requires_grad == tensor.requires_grad and torch.equal(other[name], tensor)
        assert other[name].data_ptr() != tensor.data_ptr() or not tensor.numel()
        places.setdefault(id(tensor), set()).add(id(other[name]))
    assert all(len(copies) == 1 for copies in places.values())
    inputs = inputs_for(compiled)
    expected = outputs_of(compiled, inputs)
    assert same_bits(outputs_of(copied, inputs), expected)
    perturb(copied, 0.1)
    assert largest_difference(outputs_of(copied, inputs), expected) > 1e-3
    assert same_bits(outputs_of(compiled, inputs), expected)
    copied.load_state_dict(compiled.state_dict())
    logits = []
    for model in (compiled, copied):
        torch.manual_seed(0)
        logits.append(model.train()(**inputs).logits)
    assert torch.equal(*logits)


@pytest.mark.full
def test_a_copy_is_a_whole_model() -> None:
    """A copy, even in a module, takes new signatures, is disabled, merges, loads adapters and is copied again."""
    compiled = adapted("gpt2", LORA, DORA, noise=0.1)
    copied = copy.deepcopy(nn.ModuleDict({"model": compiled}))["model"]
    inputs = inputs_for(compiled)
    expected = outputs_of(compiled, inputs)
    perturb(compiled, 0.1)
    with torch.no_grad():
        outputs = copied(**inputs, labels=inputs["input_ids"])
    assert len(copied.compilation.signatures) == 2 and len(compiled.compilation.signatures) == 1
    assert same_bits([outputs.logits], expected)
    with copied.disabled():
        assert same_bits(outputs_of(copied, inputs), outputs_of(tiny("gpt2"), inputs))
    merged = copied.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), expected) <= 2e-5
    again = copy.deepcopy(merged)
    assert same_bits(outputs_of(again, inputs), outputs_of(merged, inputs))
    shared = {t.data_ptr() for t in every_tensor(merged).values()} & {
        t.data_ptr() for t in every_tensor(again).values()
    }
    assert not shared - {0}
    copied.load_adapter_state_dict(compiled.adapter_state_dict())
    assert same_bits(outputs_of(copy.deepcopy(copied), inputs), outputs_of(compiled, inputs))


@pytest.mark.slow
def test_steering_is_copied() -> None:
    """Each model has its own gates and counter; the copy has the schedule, and warns by itself if it is not steered."""
    compiled = adapted("bert", {**SORA, "final_threshold": 0.1}, noise=0.1)
    compiled.begin(10)
    assert compiled.extra_loss() > 0
    compiled.after_step()
    copied = copy.deepcopy(compiled)
    assert torch.equal(copied.extra_loss(), compiled.extra_loss())
    copied.after_step()
    state, other = compiled.adapter_state_dict(), copied.adapter_state_dict()
    assert (int(state["graftc.gates.step"]), int(other["graftc.gates.step"])) == (1, 2)
    gate = next(name for name in state if name.endswith("gate"))
    assert not torch.equal(state[gate], other[gate])
    fresh = copy.deepcopy(adapted("bert", SORA, noise=0.1)).train()
    fresh(**inputs_for(fresh), labels=torch.arange(5) % 3).loss.backward()
    with pytest.warns(GraftWarning, match="GC025"):
        fresh.warn_of_unsteered()


@pytest.mark.slow
def test_an_average_of_weights() -> None:
    """torch's exponential moving average over three steps matches its formula."""
    compiled = adapted("bert", LORA, noise=0.1).train()
    average = AveragedModel(compiled, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    expected: dict[str, Tensor] = {}
    for step in range(3):
        perturb(compiled, 0.1)
        average.update_parameters(compiled)
        for name, parameter in compiled.named_parameters():
            own = parameter.detach().clone()
            expected[name] = own if step == 0 else 0.9 * expected[name] + 0.1 * own
    for name, parameter in average.module.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-6, atol=1e-7)
    inputs = inputs_for(compiled)
    before = outputs_of(compiled.eval(), inputs)
    assert largest_difference(outputs_of(average.module.eval(), inputs), before) > 1e-3
