"""Wirings of bottleneck adapters: equality with plain hooks, zero projections, own norms, and places in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from graftc.passes.core.build.residual import Branches
from graftc.passes.core.ir.program import Program, provenance
from graftc.testing import FAMILIES, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import floats
from tests.kit.models import fresh, still
from tests.passes.methods.bottleneck_references import hook

aten = torch.ops.aten
BOTH = {"role": ["attn.sublayer", "ffn.sublayer"]}
ATTENTION = {"role": "attn.sublayer"}
PRESETS: dict[str, dict[str, Any]] = {
    "houlsby": {"method": "houlsby"},
    "pfeiffer": {"method": "pfeiffer"},
    "bapna_firat": {"method": "bapna_firat"},
    "adapter_l": {"method": "adapter_l"},
    "he_parallel": {"method": "he_parallel"},
    "he_parallel of attention": {"method": "he_parallel", "target": ATTENTION},
    "he_sequential": {"method": "he_sequential", "target": BOTH},
}
SAME_WIRING = frozenset({"adapter_l", "he_sequential"})
"""Presets that differ from another one in their start only (`test_bottleneck_presets.py`)."""
EACH_WIRING = [
    pytest.param(name, marks=pytest.mark.full if name in SAME_WIRING else ()) for name in [*PRESETS, "llm_adapters"]
]
LLM = {"method": "llm_adapters", "target": {"role": ["attn.v", "attn.o", "ffn.down"]}}


def narrow(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an adaptation with adapters of width 5, unless it says how wide they are."""
    return entry if "reduction" in entry else {"bottleneck": 5, **entry}


def zero_up(compiled: Any) -> None:
    """Perturb every trained tensor, then set the second projections and their biases to zero."""
    perturb(compiled, 0.3)
    with torch.no_grad():
        for name, tensor in compiled.named_parameters():
            if name.rpartition(".")[2] in ("up", "up_bias"):
                tensor.zero_()


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("name", PRESETS)
def test_plain_hooks_compute_the_same(name: str, family: str) -> None:
    """Plain hooks with the same places, norms, biases, activation and scale agree to 1e-12 of the largest output."""
    model, plain = tiny(family, dtype=torch.float64), tiny(family, dtype=torch.float64)
    entry = PRESETS[name]
    compiled = fresh(model, narrow(entry))
    perturb(compiled, 0.3)
    spec = compiled.spec.adapt[0]
    hook(plain, family, name, compiled.adapter_state_dict(), spec.name, spec.activation, spec.scale)
    inputs = inputs_for(compiled)
    actual, expected = outputs_of(compiled, inputs), outputs_of(plain, inputs)
    largest = max(float(t.abs().max()) for t in expected)
    assert largest_difference(actual, expected) <= 1e-12 * max(1.0, largest)
    assert largest_difference(actual, outputs_of(model, inputs)) > 0.05


@pytest.mark.full
def test_wirings_are_told_apart() -> None:
    """With the same tensors, every wiring of a feed-forward part computes a different function."""
    model, outputs = tiny("bert"), {}
    wirings = [(r, a) for r in ("stream", "branch", "sum", "output") for a in ("branch", "output")]
    values: list[Tensor] = []
    for reads, adds_to in wirings:
        compiled = fresh(model, narrow({"method": "bottleneck", "reads": reads, "adds_to": adds_to}))
        values = values or list(perturb(compiled, 0.3).values())
        tensors = dict(zip(compiled.adapter_state_dict(), values, strict=True))
        compiled.load_adapter_state_dict(tensors)
        outputs[reads, adds_to] = outputs_of(compiled, inputs_for(compiled))
    for index, one in enumerate(wirings):
        for other in wirings[index + 1 :]:
            assert largest_difference(outputs[one], outputs[other]) > 1e-2, (one, other)


# --- zero second projections ----------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EACH_WIRING)
def test_zero_up_is_the_base(name: str, family: str) -> None:
    """With zero second projections, eval mode gives the base to the bit for any first projections and norms."""
    if family == "mixtral" and name == "llm_adapters":
        entry = {**LLM, "target": {"role": ["attn.v", "attn.o"]}}
    else:
        entry = PRESETS.get(name, LLM)
    model = tiny(family)
    compiled = fresh(model, narrow(entry))
    zero_up(compiled)
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("name", EACH_WIRING)
def test_zero_up_is_the_base_in_train_mode(name: str, family: str) -> None:
    """Without dropout in the config, zero second projections give the base to the bit in train mode, too."""
    model = still(family, **({"dropout_rate": 0.0} if family == "t5" else {})).train()
    compiled = fresh(model, narrow(PRESETS.get(name, LLM))).train()
    zero_up(compiled)
    inputs = inputs_for(compiled)
    with torch.no_grad():
        actual, expected = (floats(m(**inputs)) for m in (compiled, model))
    assert same_bits(actual, expected)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_residual_from_behind_the_norm_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pfeiffer's residual is taken before the norm. If it is taken after it, zero projections do not give the base, so
    the test above would fail.
    """
    right = Branches.add_at

    def wrong(self: Any, site: Any, place: str, delta: fx.Node, *rest: Any) -> None:
        moved = self.call(aten.sub.Tensor, self.at(site, "output"), self.at(site, "branch"))
        right(self, site, place, self.call(aten.add.Tensor, delta, moved), *rest)

    model = tiny(family)
    for add_at, same in ((right, True), (wrong, False)):
        monkeypatch.setattr(Branches, "add_at", add_at)
        compiled = fresh(model, narrow(PRESETS["pfeiffer"]))
        zero_up(compiled)
        inputs = inputs_for(compiled)
        actual, base = outputs_of(compiled, inputs), outputs_of(model, inputs)
        assert same_bits(actual, base) == same
        assert (largest_difference(actual, base) > 1e-2) != same


@pytest.mark.slow
def test_the_wrong_residual_in_plain_torch() -> None:
    """Without any graph, hooks with ``u`` as the residual do not give the base with a zero projection, and
    differ from Pfeiffer's adapter with another.
    """
    compiled = fresh("bert", narrow(PRESETS["pfeiffer"]))
    perturb(compiled, 0.3)
    state, inputs = compiled.adapter_state_dict(), inputs_for(compiled)
    zeros = {n: torch.zeros_like(t) if ".up" in n else t for n, t in state.items()}
    base = outputs_of(tiny("bert"), inputs)
    for tensors, expected in ((state, outputs_of(compiled, inputs)), (zeros, base)):
        for wiring, same in (("pfeiffer", True), ("wrong residual", False)):
            plain = tiny("bert")
            hook(plain, "bert", wiring, tensors, "pfeiffer", "relu", 1.0)
            assert (largest_difference(outputs_of(plain, inputs), expected) <= 1e-5) == same


# --- places in the graph --------------------------------------------------------------------------------------


def inserted(program: Program, part: str) -> list[fx.Node]:
    """Return the inserted calls of one part of the adaptation, in order."""
    tags = [(node, provenance(node)) for node in program.graph.nodes]
    return [node for node, tag in tags if tag is not None and tag["part"] == part and node.op == "call_function"]


@pytest.mark.slow
def test_houlsby_adds_behind_dropout_and_before_the_residual() -> None:
    """In the train graph, adapters of both sublayers of both layers add after dropout and before the residual."""
    compiled = fresh("bert", narrow(PRESETS["houlsby"]))
    adds = inserted(compiled.program("train"), "add")
    assert len(adds) == 4
    for node in adds:
        value = node.args[0]
        assert value.target is aten.dropout.default and provenance(value) is None
        assert {user.target for user in value.users} == {aten.linear.default, aten.add.Tensor}
        (residual,) = node.users
        assert residual.target is aten.add.Tensor and provenance(residual) is None
        (norm,) = residual.users
        assert norm.target is aten.layer_norm.default and provenance(norm) is None


@pytest.mark.slow
def test_pfeiffer_runs_the_norm_twice() -> None:
    """The second norm uses the model's own scale and shift, and the stream continues from it."""
    compiled = fresh("bert", narrow(PRESETS["pfeiffer"]))
    again = [n for n in inserted(compiled.program("eval"), "again") if n.target is aten.layer_norm.default]
    assert [n.args[2].target for n in again] == [f"bert.encoder.layer.{i}.output.LayerNorm.weight" for i in (0, 1)]
    assert not [name for name in compiled.adapter_state_dict() if "norm" in name]
    first = [n for n in compiled.program("eval").graph.nodes if n.target is aten.layer_norm.default]
    assert len(first) == 1 + 2 * 3  # embeddings; attention and feed-forward, the latter twice


_NORM = (aten.layer_norm.default, aten.mul.Tensor, aten.add.Tensor)
"""The operators of a layer norm with separate scale and shift."""


@pytest.mark.full
@pytest.mark.parametrize("name", ["adapter_l", "bapna_firat"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_norms_of_their_own(name: str, family: str) -> None:
    """Each layer has one norm of its own, which is applied to the layer's output before the first projection."""
    compiled = fresh(family, narrow(PRESETS[name]))
    parts, downs = (inserted(compiled.program("eval"), part) for part in ("norm", "down"))
    norms, scales, shifts = ([n for n in parts if n.target is t] for t in _NORM)
    assert len(norms) == 2 and [d.args[0] for d in downs] == shifts
    assert [n.args[0] for n in scales] == norms and [n.args[0] for n in shifts] == scales
    assert all(n.args[1].target.endswith(f"graftc.{name}.ffn.norm_weight") for n in scales)
    adds = inserted(compiled.program("eval"), "add")
    assert [n.args[0] for n in norms] == [a.args[0] for a in adds]
    base = "layer_norm" if family == "bert" else "add"
    assert all(base in a.args[0].name and provenance(a.args[0]) is None for a in adds)


@pytest.mark.full
def test_parallel_reads_what_no_norm_has_seen() -> None:
    """GPT-2's parallel adapter reads the input of ``ln_2``, not its output; on the attention, that of ``ln_1``."""
    for name, norm in (("he_parallel", "ln_2"), ("he_parallel of attention", "ln_1")):
        program = fresh("gpt2", narrow(PRESETS[name])).program("eval")
        norms = [
            n for n in program.graph.nodes if n.target is aten.layer_norm.default and f".{norm}." in n.args[2].target
        ]
        assert len(norms) == 2
        assert [d.args[0] for d in inserted(program, "down")] == [n.args[0] for n in norms]


@pytest.mark.slow
def test_parallel_of_an_attention_adds_to_its_heads() -> None:
    """The added value has the width of the heads and passes through the output projection."""
    compiled = fresh("gpt2", narrow(PRESETS["he_parallel of attention"]))
    for node in inserted(compiled.program("eval"), "add"):
        (user,) = node.users if len(node.users) == 1 else [None]
        assert user is not None
        while user.target is aten.view.default:
            (user,) = user.users
        assert user.meta["module"].endswith("attn.c_proj")
