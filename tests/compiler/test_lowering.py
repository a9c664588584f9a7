"""Steps of lowering: on every family, the code that runs equals the printed graph, and steps report their work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.ir.printer import format_program
from graftc.passes.core.ir.verify import SIZE_CHOICES, check_types
from graftc.passes.core.ops.projections import projections
from graftc.runtime.compiled import Compiled
from graftc.testing import perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import FAMILIES, llama, tiny
from tests.kit.comparing import floats, gradients_of
from tests.kit.language_models import language_model

QKVO = ["attn.q", "attn.k", "attn.v", "attn.o"]
ROLES = {
    "llama": [*QKVO, "ffn.gate", "ffn.up", "ffn.down"],
    "gemma2": [*QKVO, "ffn.gate", "ffn.up", "ffn.down"],
    "mixtral": [*QKVO, "experts"],
}
MAPS = {
    "bert": [3, 1, 1, 1],
    "roberta": [3, 1, 1, 1],
    "gpt2": [1, 1, 1, 1],
    "gpt_neox": [1, 1, 1, 1],
    "llama": [3, 1, 2, 1],
    "gemma2": [3, 1, 2, 1],
    "mixtral": [3, 1],
    "vit": [3, 1, 1, 1],
}
"""How many maps are computed together in a layer, call by call."""


def model(family: str) -> nn.Module:
    """Return a tiny model in float64."""
    return language_model(family).double().eval() if family == "gemma2" else tiny(family, dtype=torch.float64)


def both(family: str, *adapt: dict[str, Any], **spec: Any) -> tuple[Compiled, Compiled]:
    """Return the same model with and without lowering steps, in train mode, as after some training."""
    base = model(family)
    entries = [{"target": {"role": ROLES.get(family, [*QKVO, "ffn.up", "ffn.down"])}, **entry} for entry in adapt]
    pair = [graftc.compile({**spec, "adapt": entries, "optimise": {"off": off}}, base) for off in ([], ["projections"])]
    perturb(pair[0], 0.05)
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0].train(), pair[1].train()


def step(compiled: Compiled, seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs of a call in train mode, and all gradients."""
    inputs = inputs_for(compiled, front=False)
    torch.manual_seed(seed)
    outputs = floats(compiled(**inputs))
    generator = torch.Generator().manual_seed(1)
    loss = sum((leaf * torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)).sum() for leaf in outputs)
    compiled.zero_grad()
    loss.backward()
    return outputs, gradients_of(compiled)


def assert_equal_steps(compiled: Compiled, plain: Compiled) -> None:
    """Check that outputs and gradients are equal to within 1e-10 of their size."""
    (mine, my_grads), (theirs, their_grads) = step(compiled), step(plain)
    assert my_grads.keys() == their_grads.keys() and my_grads
    pairs = [*zip(mine, theirs, strict=True), *((my_grads[name], their_grads[name]) for name in their_grads)]
    assert all(torch.isfinite(b).all() for _, b in pairs)
    # The gradient of a key's bias is zero except for rounding.
    assert all((a - b).norm() <= 1e-10 * b.norm() + 1e-13 for a, b in pairs)
    assert any(grad.norm() > 0 for grad in their_grads.values())


def calls(compiled: Compiled) -> list[int]:
    """Return how many maps each call of the training graph computes."""
    nodes = training(compiled).graph.nodes
    return [len(node.args[4]) for node in nodes if node.target is projections]


def training(compiled: Compiled) -> Any:
    """Return the lowered training Program."""
    return next(e.lowered for key, e in compiled._graftc.shown.executables.items() if key.mode == "train")


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_what_is_run_equals_what_is_printed(family: str) -> None:
    # T5 draws in another order: without its cross-attention's first products, layers are called once, not twice.
    dropout = 0.0 if family == "t5" else 0.1
    compiled, plain = both(family, {"method": "lora", "rank": 2, "dropout": dropout})
    assert_equal_steps(compiled, plain)
    if family in MAPS:
        assert calls(compiled) == MAPS[family] * 2
    outcomes = compiled.lowering().outcomes
    assert {o.reason for o in outcomes if not o.done} == ({"experts"} if family == "mixtral" else set())
    assert len(outcomes) == len(compiled.snapshot.sites)
    assert not plain.lowering().outcomes and not calls(plain)


@pytest.mark.full
@pytest.mark.parametrize(
    "adapt",
    [
        [{"method": "dora", "rank": 2}],
        [{"method": "ia3"}],
        [{"method": "adalora", "rank": 2, "target_rank": 1}],
        [{"method": "sora", "rank": 2}],
        [{"method": "vera", "rank": 2}],
        [{"method": "lora", "rank": 2, "init": "pissa"}],
        [{"method": "lora", "rank": 2, "freeze_a": True}],
        [{"method": "lora", "rank": 2, "bias": "all", "dropout": 0.1, "dropout_scope": "target"}],
        [{"method": "lora", "rank": 2, "dropout": 0.1, "dropout_mask": "recomputed"}],
        [{"method": "lora", "name": "a", "rank": 2}, {"method": "lora", "name": "b", "rank": 3}],
        [{"method": "lora", "rank": 2}, {"method": "ia3"}],
    ],
    ids=lambda adapt: "+".join(str(v) for entry in adapt for v in entry.values()),
)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_every_kind_of_update(family: str, adapt: list[dict[str, Any]]) -> None:
    if family == "llama":
        adapt = [entry for entry in adapt if entry.pop("bias", None) or True]
    compiled, plain = both(family, *[dict(entry) for entry in adapt])
    # A single weight to which nothing is added gains nothing.
    assert calls(compiled) or (adapt[0]["method"] == "ia3" and family in ("gpt2", "gpt_neox"))
    assert_equal_steps(compiled, plain)


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "t5", "mixtral"])
def test_a_lowered_graph_is_sound_and_the_other_stays(family: str) -> None:
    roles = [r for r in ROLES.get(family, [*QKVO, "ffn.up"]) if r != "experts"]
    adapt = {"method": "lora", "target": {"role": roles}, "rank": 2}
    compiled = graftc.compile({"adapt": [adapt]}, tiny(family))
    plain = graftc.compile({"adapt": [adapt], "optimise": {"off": ["projections"]}}, tiny(family))
    assert compiled.print_graph("train") == plain.print_graph("train")
    lowered = training(compiled)
    lowered.graph.lint()
    for sizes in SIZE_CHOICES:
        assert check_types(lowered, sizes) is None
    assert "projections" in format_program(lowered) and "projections" not in format_program(compiled.program("train"))


def test_maps_whose_input_is_written_to_stay() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = x * 2
            q = self.q(h)
            h.add_(1)
            return q * self.k(h)

    adapt = {"method": "lora", "target": {"modules": ["q", "k"]}, "rank": 2}
    base = Written().double()
    spec, inputs = {"adapt": [adapt]}, {"x": torch.randn(2, 6, dtype=torch.float64)}
    compiled = graftc.compile(spec, base, inputs).train()
    plain = graftc.compile({**spec, "optimise": {"off": ["projections"]}}, base, inputs)
    perturb(compiled, 0.05)
    plain.train().load_state_dict(compiled.state_dict())
    assert not calls(compiled)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), plain(**inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_report_is_a_table() -> None:
    adapt = {"method": "lora", "target": {"role": ["attn.q", "experts"]}, "rank": 2}
    compiled = graftc.compile({"adapt": [adapt]}, tiny("mixtral"))
    first, *lines = str(compiled.lowering()).splitlines()
    assert first.split() == ["step", "sites", "outcome", "first"]
    assert [line.split("  ")[0] for line in lines] == ["projections"] * 2
    assert "rewritten" in lines[0] and "left as they are: experts" in lines[1]


@pytest.mark.full
def test_layers_have_one_call_each_and_one_code() -> None:
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": {"role": QKVO}}]}, llama(num_hidden_layers=3))
    functions = [f for block in compiled._graftc.blocks.values() for f in block._graftc.functions.values()]
    names = {key for block in compiled._graftc.blocks.values() for key in block._graftc.functions}
    assert all(name.endswith("#0") for name in names)
    assert len(set(functions)) == 2  # train and eval
