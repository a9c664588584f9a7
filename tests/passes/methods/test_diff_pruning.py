"""Diff pruning: gates, the penalty, and the entries that are left."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import graftc
from graftc.compiler.pipeline import recompile
from graftc.compiler.steering import live_places
from graftc.passes.core.method.capabilities import Staged
from graftc.passes.core.method.registry import method_for
from graftc.passes.methods.diff_pruning import OpenGates
from graftc.runtime.compiled import Compiled, make_compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import gradients_of, same_tensors, trainable
from tests.kit.training import adamw

GATES: dict[str, Any] = {"method": "diff_pruning", "initial_alpha": 2.0, "stretch": [-0.1, 1.1]}
"""Gates that without noise are neither closed nor fully open (``z = 0.957``), and with noise are seldom closed."""


def half_open(family: str = "bert", model: nn.Module | None = None, **fields: Any) -> Compiled:
    """A model with random differences and gates: some gates are closed, some open, most in between."""
    entry = {"method": "diff_pruning", "density": 0.02, **fields}
    compiled = graftc.compile({"adapt": [entry]}, tiny(family) if model is None else model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in compiled.adapter_state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            tensor.copy_(noise * 0.1 if name.endswith("_w") else noise + 0.8)
    return compiled


def base_name(name: str, suffix: str) -> str:
    """Return the name of the base tensor that an adapter tensor belongs to."""
    return name.replace(".graftc.diff_pruning", "").removesuffix(suffix)


def gate(alpha: Tensor, low: float = -1.5, high: float = 1.5) -> Tensor:
    """Return the values of gates without noise."""
    return torch.clamp(torch.sigmoid(alpha) * (high - low) + low, 0, 1)


def differences(compiled: Compiled, low: float = -1.5, high: float = 1.5) -> dict[str, Tensor]:
    """Return ``z z_group w`` of every tensor, computed by hand, by the base tensor's name."""
    state = compiled.adapter_state_dict()
    changes = {}
    for name, w in state.items():
        if name.endswith("_w"):
            stem = name.removesuffix("_w")
            outer = state.get(f"{stem}_group")
            own = gate(state[f"{stem}_alpha"], low, high) * w
            changes[base_name(name, "_w")] = own if outer is None else own * gate(outer, low, high)
    return changes


def advanced(compiled: Compiled) -> Compiled:
    """Return the model that the second training starts from."""
    compilation = compiled.compilation
    (resolved,) = compilation.main.resolved
    method = method_for("diff_pruning")
    assert isinstance(method, Staged) and method.stages(resolved.spec) == 2
    following = method.advance(resolved.spec, *live_places(compilation, resolved))
    assert following.spec.stage == 2 and not following.rewind
    spec = compilation.spec.model_copy(update={"adapt": (following.spec,)})
    return make_compiled(recompile(compilation, spec, following.values))


@pytest.mark.full
def test_eval_mode_is_the_formula_without_noise() -> None:
    """Outputs and gradients of all parameters equal those of the base with changed parameters, in float64."""
    model = tiny("bert").double().eval()
    compiled = half_open(model=model).eval()
    inputs = inputs_for(compiled)
    trained = trainable(compiled)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in trained.items()}
    assert all(p.dtype == torch.float64 for p in leaves.values())
    changed = dict(model.named_parameters())
    for name, w in leaves.items():
        if name.endswith("_w"):
            stem = name.removesuffix("_w")
            own = gate(leaves[f"{stem}_alpha"]) * w * gate(leaves[f"{stem}_group"])
            changed[base_name(name, "_w")] = changed[base_name(name, "_w")].detach() + own
    actual, expected = compiled(**inputs).logits, functional_call(model, changed, (), inputs).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    factor = torch.randn_like(actual)
    torch.autograd.backward([(actual * factor).sum(), (expected * factor).sum()])
    for name, leaf in leaves.items():
        own, other = trained[name].grad, leaf.grad
        assert own is not None and other is not None
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_passes_draw_noise_of_their_own_and_eval_mode_none() -> None:
    """Noise follows torch's seed, with another seed for every tensor, even of equal size; eval mode draws none."""
    compiled = half_open()
    inputs = inputs_for(compiled)
    compiled.eval()
    assert torch.equal(compiled(**inputs).logits, compiled(**inputs).logits)
    assert not any("rand" in str(node.target) for node in compiled.program("eval").graph.nodes)
    compiled.train()
    first = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        first.append(compiled(**inputs).logits)
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    gated = [n for n in compiled.program("train").graph.nodes if n.target is torch.ops.graftc.gated_weight.default]
    assert len(gated) == len(differences(compiled)) == len({node.args[4] for node in gated})


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_recomputed_layer_has_the_same_noise(family: str) -> None:
    """Gradients with and without recomputation are equal to the bit."""
    gradients = []
    for checkpoint in (None, "layers"):
        entry = {"method": "diff_pruning", "initial_alpha": 0.8}
        compiled = graftc.compile({"adapt": [entry], "checkpoint": checkpoint}, tiny(family)).train()
        assert compiled.is_gradient_checkpointing == (checkpoint == "layers")
        perturb(compiled, 0.1)
        torch.manual_seed(3)
        compiled(**inputs_for(compiled)).logits.pow(2).mean().backward()
        gradients.append(gradients_of(compiled))
    assert gradients[0].keys() == gradients[1].keys() and any(
        bool(g.any()) for n, g in gradients[0].items() if "alpha" in n
    )
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.full
@pytest.mark.parametrize("fields", [{}, {"structured": False}, {"group_penalty": "product"}], ids=str)
def test_the_penalty_is_the_expected_number_of_open_gates(fields: dict[str, Any]) -> None:
    """The penalty and its gradient equal the closed form, for an asymmetric stretch."""
    stretch = (-0.3, 1.2)
    compiled = half_open(penalty=0.01, stretch=stretch, **fields)
    objective = compiled.steering.objectives["diff_pruning"]
    assert isinstance(objective, OpenGates)
    state = {n: t.double().requires_grad_() for n, t in compiled.adapter_state_dict().items()}
    shift = math.log(0.3 / 1.2)
    total = torch.zeros((), dtype=torch.float64)
    for name, alpha in state.items():
        if not name.endswith("_alpha"):
            continue
        entries = torch.sigmoid(alpha - shift).sum()
        group = state.get(name.removesuffix("_alpha") + "_group")
        if group is None:
            total = total + entries
        elif fields:
            total = total + entries * torch.sigmoid(group - shift).sum()
        else:
            total = total + entries + torch.sigmoid(group - shift).sum()
    loss = compiled.extra_loss()
    torch.testing.assert_close(loss.double(), 0.01 * total, rtol=1e-6, atol=0)
    (0.01 * total).backward()
    loss.backward()
    for name, parameter in compiled.named_parameters():
        if parameter.requires_grad and not name.endswith("_w"):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad.double(), state[name].grad, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_no_penalty_no_objective() -> None:
    assert not half_open(penalty=0).steering.objectives
    assert not adapted_again().steering.objectives


def adapted_again(**fields: Any) -> Compiled:
    """A model in the second training, without a first one."""
    return graftc.compile({"adapt": [{"method": "diff_pruning", "stage": 2, **fields}]}, tiny("bert"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("bert", {}),
        ("gpt2", {"structured": False}),
        ("gpt2", {"target": {"role": ["attn.q", "attn.v"]}}),
        ("gpt_neox", {"target": {"role": ["attn.q", "attn.v", "ffn.up"]}}),
        ("mixtral", {"entries": 321, "density": None}),
        ("t5", {"stretch": [-0.2, 1.1]}),
    ],
    ids=str,
)
def test_the_largest_differences_are_left(family: str, fields: dict[str, Any]) -> None:
    """Exactly as many as the budget says are left, with the values of the first training, including rows of a fused
    weight: the outputs are those of the base with all other differences set to zero.
    """
    model = tiny(family).eval()
    compiled = half_open(family, model, **fields).eval()
    inputs = inputs_for(compiled)
    (resolved,) = compiled.compilation.main.resolved
    changes = differences(compiled, *resolved.spec.stretch)
    sizes = torch.cat([delta.flatten().abs() for delta in changes.values()])
    count = resolved.spec.budget(sizes.numel())
    kept = advanced(compiled).eval()
    state = kept.adapter_state_dict()
    assert sum(t.numel() for n, t in state.items() if n.endswith("_delta")) == count == kept.report.deployed_parameters
    least = min(float(t.abs().min()) for n, t in state.items() if n.endswith("_delta"))
    assert least == pytest.approx(float(sizes.sort(descending=True).values[count - 1]), rel=1e-5, abs=1e-8)
    whole = dict(compiled.merge().to_transformers().named_parameters())
    expected = {n: p.detach().clone() for n, p in model.named_parameters()}
    for name, left in kept.merge().to_transformers().named_parameters():
        moved = left != expected[name]
        torch.testing.assert_close(left[moved], whole[name][moved], rtol=0, atol=5e-7)
        expected[name][moved] = whole[name][moved]
    actual, wanted = outputs_of(kept, inputs), outputs_of(_with(model, expected), inputs)
    assert largest_difference(actual, wanted) <= 1e-5
    assert largest_difference(actual, outputs_of(model, inputs)) > 1e-3


def _with(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with other parameters."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.copy_(values[name])
    return changed


@pytest.mark.slow
def test_equals_are_taken_in_order() -> None:
    """If all differences are equal, the first ones are taken; a threshold would leave all or none."""
    compiled = half_open(density=0.01)
    with torch.no_grad():
        for name, tensor in compiled.adapter_state_dict().items():
            tensor.fill_(0.25 if name.endswith("_w") else 9.0)
    total = sum(t.numel() for n, t in compiled.adapter_state_dict().items() if n.endswith("_w"))
    left = advanced(compiled).adapter_state_dict()
    indices = {base_name(n, "_indices"): t for n, t in left.items() if n.endswith("_indices")}
    assert sum(t.numel() for t in indices.values()) == math.floor(0.01 * total)
    assert list(indices) == [next(iter(differences(compiled)))], "the first tensor is large enough for all of them"
    (first,) = indices.values()
    assert torch.equal(first, torch.arange(first.numel(), dtype=first.dtype))


@pytest.mark.full
def test_without_a_first_training_nothing_is_lost() -> None:
    """The base is unchanged if all differences are zero, or if a second training starts from random entries."""
    fresh = graftc.compile({"adapt": [{"method": "diff_pruning", "density": 0.01}]}, tiny("bert")).eval()
    model = tiny("bert").eval()
    for second in (advanced(fresh), adapted_again(density=0.01)):
        state = second.eval().adapter_state_dict()
        assert not any(bool(t.any()) for n, t in state.items() if n.endswith("_delta"))
        inputs = inputs_for(second)
        assert same_bits(outputs_of(second, inputs), outputs_of(model, inputs))
        assert second.report.trainable_parameters == fresh.report.deployed_parameters
    assert all(f"{base_name(n, '_delta')}" in dict(model.named_parameters()) for n in state if n.endswith("_delta"))


@pytest.mark.full
def test_the_second_training_changes_what_is_left_and_nothing_else() -> None:
    """After AdamW with a weight decay of 0.5 and merging, every other entry is the base's to the bit."""
    model = tiny("bert").eval()
    second = advanced(half_open(model=model, density=0.05)).train()
    optimiser = adamw(second, lr=1e-2, weight_decay=0.5)
    before = {n: t.clone() for n, t in second.adapter_state_dict().items()}
    for number in range(4):
        optimiser.zero_grad()
        second(**inputs_for(second, seed=number), labels=torch.arange(5) % 3).loss.backward()
        optimiser.step()
    after = second.adapter_state_dict()
    assert all(torch.equal(before[n], t) for n, t in after.items() if n.endswith("_indices"))
    merged = second.eval().merge()
    assert merged.certificate.passed
    chosen = {base_name(n, "_indices"): t.long() for n, t in after.items() if n.endswith("_indices")}
    moved = 0
    for name, value in merged.to_transformers().named_parameters():
        base = dict(model.named_parameters())[name].detach()
        free = torch.ones(base.numel(), dtype=torch.bool)
        free[chosen.get(name, torch.empty(0, dtype=torch.int64))] = False
        assert torch.equal(value.flatten()[free], base.flatten()[free]), name
        moved += int((value.flatten() != base.flatten()).sum())
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("classifier"))
    assert 0.9 * 0.05 * total < moved <= math.floor(0.05 * total)


@pytest.mark.full
def test_both_groups_train_in_the_first_training() -> None:
    """Values and gates train in two groups with clipping; a heavy penalty closes gates, and the fold passes."""
    model = tiny("bert").eval()
    entry = {"method": "diff_pruning", "penalty": 1e-2, "initial_alpha": 2.0}
    compiled = graftc.compile({"adapt": [entry]}, model).train()
    trained = trainable(compiled)
    gates = [p for n, p in trained.items() if n.endswith(("_alpha", "_group"))]
    values = [p for n, p in trained.items() if not n.endswith(("_alpha", "_group"))]
    assert sum(p.numel() for p in gates) == sum(p.numel() for p in values) + len(values)
    optimiser = torch.optim.AdamW([{"params": values, "lr": 1e-3}, {"params": gates, "lr": 0.1}])
    start = compiled.extra_loss().item()
    for number in range(8):
        optimiser.zero_grad()
        loss = compiled(**inputs_for(compiled, seed=number), labels=torch.arange(5) % 3).loss
        (loss + compiled.extra_loss()).backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimiser.step()
    assert compiled.extra_loss().item() < 0.98 * start
    assert all(bool((p != 0).any()) for n, p in trained.items() if n.endswith("weight_w"))
    merged = compiled.eval().merge()
    assert merged.certificate.passed, merged.certificate.failures()
    reference = dict(model.named_parameters())
    for name, value in merged.to_transformers().named_parameters():
        if name in differences(compiled):
            wanted = reference[name].detach() + differences(compiled)[name]
            torch.testing.assert_close(value.detach(), wanted, rtol=0, atol=1e-6)


@pytest.mark.full
def test_beside_others() -> None:
    """With LoRA on top and a mask in the same tensors, all adaptations fold into one function."""
    adapt = [
        {**GATES, "target": {"role": ["attn.q", "ffn.down"]}},
        {"method": "mask", "selection": "magnitude", "density": 0.1, "target": {"role": ["attn.q", "ffn.up"]}},
        {"method": "lora", "rank": 4, "target": {"role": ["attn.q", "attn.v"]}},
    ]
    for family in ("bert", "gpt2"):
        compiled = graftc.compile({"adapt": adapt}, tiny(family)).eval()
        perturb(compiled, 0.1)
        merged = compiled.merge()
        assert merged.certificate.passed, merged.certificate.failures()
        inputs = inputs_for(compiled)
        assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
def test_a_base_of_16_bits() -> None:
    """Parameters are float32, and the model starts as the base to the bit and trains."""
    model = tiny("bert").to(torch.bfloat16).eval()
    compiled = graftc.compile({"adapt": [{"method": "diff_pruning"}]}, model)
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    compiled.train()(**inputs).logits.float().pow(2).sum().backward()
    trained = [p for p in compiled.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert any(p.grad is not None and bool(p.grad.any()) for p in trained)


@pytest.mark.full
def test_an_artifact_of_the_first_training(tmp_path: Any) -> None:
    """A loaded artifact gives the same outputs to the bit, and its next stage leaves the same entries."""
    compiled = half_open().eval()
    compiled.save(tmp_path / "kept")
    again = graftc.load(tmp_path / "kept", tiny("bert")).eval()
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(again, inputs), outputs_of(compiled, inputs))
    first, second = advanced(compiled).adapter_state_dict(), advanced(again).adapter_state_dict()
    assert same_tensors(first, second)


@pytest.mark.full
def test_what_is_counted() -> None:
    """``2 N`` parameters and one for each tensor train; after either training, the budget is deployed."""
    compiled = half_open(density=0.013)
    changes = differences(compiled)
    total = sum(delta.numel() for delta in changes.values())
    assert total == sum(p.numel() for n, p in tiny("bert").named_parameters() if not n.startswith("classifier"))
    report = compiled.report
    assert (report.trainable_parameters, report.deployed_parameters) == (2 * total + len(changes), int(0.013 * total))
    second = adapted_again(density=0.013).report
    assert second.trainable_parameters == second.deployed_parameters == int(0.013 * total)
    assert half_open(structured=False).report.trainable_parameters == 2 * total


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"stage": 3}, "GC002", "stage"),
        ({"stretch": [0.5, 1.5]}, "GC002", "stretch"),
        ({"stretch": [-0.5, 1.0]}, "GC002", "stretch"),
        ({"stretch": [-0.5]}, "GC002", "stretch"),
        ({"density": 0.1, "entries": 3}, "GC002", "density and entries"),
        ({"density": 1e-9}, "GC020", "0 of the target's"),
        ({"entries": 10**9}, "GC020", "1000000000"),
    ],
    ids=str,
)
def test_what_cannot_be(fields: dict[str, Any], code: str, text: str) -> None:
    """Each invalid value raises its code in the first training."""
    with pytest.raises(GraftError, match=text) as error:
        graftc.compile({"adapt": [{"method": "diff_pruning", **fields}]}, tiny("bert"))
    assert error.value.code == code
