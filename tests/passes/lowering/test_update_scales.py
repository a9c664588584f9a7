"""Sums that scale low-rank updates: fewer operators in eval graphs, and the same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from graftc.passes.core.ir.program import Program
from graftc.passes.lowering.update_scales import scale_in_sums
from graftc.testing import perturb
from graftc.testing.compare import inputs_for
from tests.kit.language_models import language_model
from tests.kit.models import fresh

aten = torch.ops.aten
QKVO = ["attn.q", "attn.k", "attn.v", "attn.o"]


def lora(**more: Any) -> dict[str, Any]:
    return {"method": "lora", "rank": 3, "alpha": 7, "target": {"role": [*QKVO, "ffn.up", "ffn.down"]}, **more}


def programs(compiled: Any) -> list[tuple[Program, Program]]:
    """Return the eval graphs that have run, as printed and as they run."""
    installed = compiled._graftc.shown.executables
    return [(each.program, each.lowered) for key, each in installed.items() if key.mode == "eval"]


def scaled(program: Program) -> list[fx.Node]:
    """Return the sums that scale what they add."""
    return [node for node in program.graph.find_nodes(op="call_function", target=aten.add.Tensor) if node.kwargs]


@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "t5"])
def test_results_are_those_of_the_merged_model(family: str) -> None:
    """In double precision; the sum scales every update, and the portable graph stays as it is."""
    compiled = fresh(language_model(family).double(), lora()).eval()
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled, front=False)
    outputs = compiled(**inputs).logits.detach()
    assert torch.allclose(outputs, compiled.merge()(**inputs).logits, rtol=0, atol=1e-10 * float(outputs.abs().max()))
    for printed, run in programs(compiled):
        assert not scaled(printed) and all(node.kwargs == {"alpha": 7 / 3} for node in scaled(run))
        removed = sum(node.target is aten.mul.Tensor for node in printed.graph.nodes) - sum(
            node.target is aten.mul.Tensor for node in run.graph.nodes
        )
        assert removed == len(scaled(run)) > 0


def test_changes_in_place_show_in_the_next_call() -> None:
    """The code reads the factors themselves."""
    compiled = fresh(language_model("llama").double(), lora()).eval()
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled, front=False)
    before = compiled(**inputs).logits
    with torch.no_grad():
        for name, parameter in compiled.named_parameters():
            if parameter.requires_grad and name.endswith("B"):
                parameter.mul_(-0.5)
    after, merged = compiled(**inputs).logits.detach(), compiled.merge()(**inputs).logits
    assert torch.allclose(after, merged, rtol=0, atol=1e-10 * float(merged.abs().max()))
    assert not torch.allclose(after, before, rtol=0, atol=1e-3)


def test_scales_that_float16_has_no_room_for_stay() -> None:
    """A small scale shrinks the hidden values first: the product with B alone would be infinite."""
    for alpha, size, moves in ((0.25, 100.0, False), (8, 100.0, True), (4e5, 1e-3, False)):
        model = torch.nn.Sequential(torch.nn.Linear(64, 32)).half()
        x = torch.full((1, 64), size, dtype=torch.float16)
        entry = {"method": "lora", "rank": 4, "alpha": alpha, "target": {"modules": "0"}}
        compiled = fresh(model, entry, inputs={"input": x}).eval()
        expected = model(x)
        assert torch.equal(compiled(x), expected), "B is zero"
        ((_, run),) = programs(compiled)
        assert bool(scaled(run)) is moves
        if alpha < 1:
            with torch.no_grad():
                for parameter in compiled.parameters():
                    if parameter.requires_grad:
                        parameter.fill_(2.0)
            assert 0 < float((compiled(x) - expected).max()) < torch.inf


def test_values_with_other_readers_are_left_alone() -> None:
    """Sums of an update whose hidden values are read elsewhere, or whose scale is a tensor, are unchanged."""
    compiled = fresh(language_model("llama"), lora()).eval()
    compiled(**inputs_for(compiled, front=False))
    ((printed, _),) = programs(compiled)
    program = printed.copy()
    first, second = [node for node in program.graph.nodes if _multiplies_hidden(node)][:2]
    with program.graph.inserting_after(first):
        reader = program.graph.call_function(aten.neg.default, (first,))
        reader.meta = dict(first.meta)
    tensor = next(node for node in program.graph.nodes if node.op == "get_attr")
    second.args = (second.args[0], tensor)
    lowered = scale_in_sums(program)
    kept = {node.name for node in lowered.graph.nodes}
    assert {first.name, second.name} <= kept
    assert len(scaled(lowered)) == len(scaled(scale_in_sums(printed))) - 2


def _multiplies_hidden(node: fx.Node) -> bool:
    hidden = node.target is aten.mul.Tensor and isinstance(node.args[1], float)
    return hidden and node.meta["val"].shape[-1] == 3 and next(iter(node.users)).target is aten.linear.default
