"""Sparse fine-tuning with a fixed selection of entries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.pipeline import recompile
from graftc.passes.core.ir.program import provenance
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, outputs_of, perturb
from graftc.testing.compare import inputs_for, largest_difference
from graftc.testing.families import tiny
from tests.kit.comparing import floats, gradients_of
from tests.runtime.training.test_selecting import deltas, entries

ops = torch.ops.graftc


class TestMask(MethodContract):
    """Random entries of every tensor."""

    contract_families = ("t5",)
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "mask", "selection": "random", "density": 0.3}


class TestMagnitude(MethodContract):
    """The largest entries, the same share of each tensor."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {
        "method": "mask",
        "selection": "magnitude",
        "density": 0.3,
        "allocation": "per_tensor",
    }


class TestDeployed(DeploymentContract):
    """Export and compilation of random entries."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "mask", "selection": "random", "density": 0.2}
    families = ("gpt2",)


def trained(compiled: Compiled, optimiser: type[torch.optim.Optimizer], steps: int = 4) -> dict[str, Tensor]:
    """Train for some steps and return, for each tensor, which entries have had a gradient."""
    parameters = [p for p in compiled.parameters() if p.requires_grad]
    optimise = optimiser(parameters, lr=1e-2, weight_decay=0.5)  # type: ignore[call-arg]
    compiled.train()
    seen = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in compiled.named_parameters() if p.requires_grad}
    for number in range(steps):
        optimise.zero_grad()
        leaves = floats(compiled(**inputs_for(compiled, seed=number)))
        torch.stack([leaf.float().square().sum() for leaf in leaves]).sum().backward()
        for name, parameter in compiled.named_parameters():
            if parameter.grad is not None:
                seen[name] |= parameter.grad != 0
        optimise.step()
    compiled.eval()
    return seen


@pytest.mark.full
@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral", "t5", "vit"])
def test_nothing_else_moves(family: str, optimiser: type[torch.optim.Optimizer]) -> None:
    """Whatever an optimiser decays, unselected entries keep their bits, and selected ones with a gradient change."""
    model = tiny(family)
    compiled = graftc.compile({"adapt": [{"method": "mask", "selection": "random", "density": 0.1}]}, model)
    seen = trained(compiled, optimiser)
    after = compiled.merge().folded_state_dict()
    chosen, own, moved = entries(compiled), deltas(compiled), 0
    for name, tensor in compiled.compilation.store.base():
        changed = set(torch.nonzero((after[name] != tensor).flatten()).flatten().tolist())
        assert changed <= chosen.get(name, set()), name
        if name in own:
            delta, indices = own[name]
            if optimiser is torch.optim.AdamW:  # SGD's steps may be too small to change a value
                assert set(indices[seen[delta]].tolist()) <= changed, name
            moved += int(seen[delta].sum())
    assert moved > 1000
    assert compiled.report.trainable_parameters == sum(len(own) for own in chosen.values())


@pytest.mark.full
def test_bytes_are_those_of_values_and_numbers() -> None:
    """Every value and every index takes four bytes, in a model of 16 bits as well."""
    spec = {"adapt": [{"method": "mask", "selection": "random", "entries": 1000}]}
    for dtype in (torch.float32, torch.bfloat16):
        (adaptation,) = graftc.compile(spec, tiny("bert", dtype=dtype)).report.adaptations
        assert (adaptation.trainable_parameters, adaptation.bytes) == (1000, 8000)


@pytest.mark.slow
def test_tied_weights_have_one_delta() -> None:
    """GPT-2's table, which is also its head, is counted once, changed in both places, and folded."""
    model = tiny("gpt2")
    spec = {"adapt": [{"method": "mask", "selection": "random", "density": 0.1, "target": {"role": "embed"}}]}
    compiled = graftc.compile(spec, model).eval()
    assert compiled.report.trainable_parameters == model.transformer.wte.weight.numel() // 10
    perturb(compiled, 0.5)
    merged = compiled.merge().to_transformers()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) < 1e-5


@pytest.mark.full
def test_exactly_so_many_with_ties() -> None:
    """If all magnitudes are equal, the first entries are taken."""
    model = tiny("bert")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.sign())
    target = {"role": ["attn.q", "ffn.up"]}
    for allocation in ("global", "per_tensor"):
        entry = {"method": "mask", "selection": "magnitude", "entries": 777, "allocation": allocation, "target": target}
        compiled = graftc.compile({"adapt": [entry]}, model)
        assert compiled.report.trainable_parameters == 777
    counts = [len(own) for own in entries(compiled).values()]
    assert len(counts) == 8 and max(counts) > min(counts) > 0


@pytest.mark.full
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("other", ["lora", "ia3", "dora"])
def test_beside_others_on_one_weight(other: str, order: int) -> None:
    """A mask is below the other adaptation in either order, and both fold. Magnitudes computed from the base's weight
    refuse a mask after them.
    """
    names = ["attn.v", "ffn.down"]
    own = {"method": "mask", "selection": "random", "density": 0.2, "target": {"role": names}}
    adapt = [own, {"method": other, "target": {"role": names}}]
    spec = {"adapt": adapt[::-1] if order else adapt}
    if other == "dora" and order:
        with pytest.raises(GraftError) as error:
            graftc.compile(spec, tiny("llama"))
        assert error.value.code == "GC021"
        return
    compiled = graftc.compile(spec, tiny("llama")).eval()
    perturb(compiled, 0.1)
    merged = compiled.merge()
    assert merged.certificate.passed
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) < 2e-5


@pytest.mark.slow
def test_a_weight_trains_as_a_whole_or_in_part() -> None:
    """A weight cannot train both as a whole and in part."""
    own = {"method": "mask", "selection": "random"}
    for adapt in ([own, {"method": "full"}], [{"method": "full"}, own]):
        with pytest.raises(GraftError) as error:
            graftc.compile({"adapt": adapt}, tiny("bert"))
        assert error.value.code == "GC021"


@pytest.mark.full
@pytest.mark.parametrize(("density", "sampled"), [(0.02, True), (0.2, False)])
def test_how_gradients_are_made_is_said(density: float, sampled: bool) -> None:
    """Few entries get their gradients one by one, many from the weight's own gradient; the node says which. Nodes name
    their adaptation, and are gone after folding.
    """
    target = {"role": ["attn.q", "ffn.down"]}
    entry = {"method": "mask", "selection": "random", "density": density, "target": target}
    compiled = graftc.compile({"adapt": [entry]}, tiny("gpt2")).eval()
    for mode in ("train", "eval"):
        nodes = compiled.program(mode).graph.find_nodes(op="call_function", target=ops.sparse_linear.default)
        assert len(nodes) == 4
        for node in nodes:
            assert node.args[-1] is sampled
            origin = provenance(node)
            assert origin is not None and origin["adaptation"] == "mask"
            assert origin["part"] == f"weight, {'sampled' if sampled else 'dense'} gradient"
    merged = compiled.merge(allow_unchanged=True)
    left = {node.target for each in merged.shown.executables.values() for node in each.program.graph.nodes}
    assert not left & {ops.sparse_linear.default, ops.sparse_weight.default}


@pytest.mark.full
def test_checkpointed_and_in_16_bits() -> None:
    """Recomputed layers give the same gradients to the bit, in a model of 16 bits as well, whose deltas have 32."""
    spec = {"adapt": [{"method": "mask", "selection": "random", "density": 0.1}]}
    compiled = graftc.compile(spec, tiny("llama", dtype=torch.bfloat16)).train()
    perturb(compiled, 0.02)
    gradients = []
    for on in (False, True):
        (compiled.gradient_checkpointing_enable if on else compiled.gradient_checkpointing_disable)()
        compiled.zero_grad()
        compiled(**inputs_for(compiled)).logits.float().square().sum().backward()
        gradients.append(gradients_of(compiled))
    assert gradients[0] and all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())
    assert {g.dtype for g in gradients[0].values()} == {torch.float32}


@pytest.mark.full
def test_indices_that_are_no_entries(tmp_path: Path) -> None:
    """A file may contain anything: indices out of range, repeated or unordered never reach a kernel."""
    model = tiny("bert")
    spec = {"adapt": [{"method": "mask", "selection": "random", "density": 0.1, "target": {"role": "ffn.up"}}]}
    compiled = graftc.compile(spec, model)
    name = next(n for n in compiled.adapter_state_dict() if n.endswith("weight_indices"))
    for bad in (torch.tensor(10**6), torch.tensor(-1), compiled.adapter_state_dict()[name][1]):
        values = {n: t.clone() for n, t in compiled.adapter_state_dict().items()}
        values[name][0] = bad
        with pytest.raises(GraftError) as error:
            recompile(compiled.compilation, compiled.compilation.spec, values)
        assert error.value.code == "GC053"
