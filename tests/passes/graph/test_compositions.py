"""Compositions of what adaptations add: averages, AdapterFusion, spans of the sequence, gates, stacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import graftc
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.verify import verify
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import FAMILIES, tiny
from tests.kit.comparing import floats, trainable
from tests.kit.models import adapted, fresh, with_tensors
from tests.kit.training import adamw

LORA = {"method": "lora", "rank": 3, "target": {"role": "attn.{q,v}"}}
PFEIFFER = {"method": "pfeiffer", "reduction": 4}
HOULSBY = {"method": "houlsby", "bottleneck": 6}
BASES: Mapping[str, Mapping[str, Any]] = {"lora": LORA, "pfeiffer": PFEIFFER, "houlsby": HOULSBY}
SOME = ("bert", "gpt2", "mixtral", "t5")
"""Where every kind runs in ``make test``; ``make test-full`` has the other families."""
KINDS: Mapping[str, dict[str, Any]] = {
    "average": {"average": ["a", "b"]},
    "average of parameters": {"average": ["a", "b"], "of": "parameters"},
    "fuse": {"fuse": ["a", "b"], "train": "all"},
    "split": {"split": ["a", "b"], "at": [3]},
    "gate": {"gate": ["a", "b"]},
}


def composed(family: str, base: Mapping[str, Any], compose: Any, names: str = "ab") -> Compiled:
    """Compile adaptations that are alike, composed, perturbed, in eval mode."""
    return adapted(family, *({**base, "name": name} for name in names), compose=compose)


def alone(compiled: Compiled, family: str, base: Mapping[str, Any], name: str) -> Compiled:
    """Compile one of the adaptations with the same tensors, without the composition."""
    return with_tensors(fresh(family, {**base, "name": name}), compiled.adapter_state_dict())


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["lora", "pfeiffer"])
@pytest.mark.parametrize("family", [f if f in SOME else pytest.param(f, marks=pytest.mark.full) for f in FAMILIES])
def test_every_kind_on_every_family(family: str, base: str, kind: str) -> None:
    """It passes verification and changes the outputs, and every trained tensor gets a gradient."""
    compiled = composed(family, BASES[base], KINDS[kind])
    compilation = compiled.compilation
    for program in (compilation.program("train"), compilation.program("eval")):
        verify(program, compilation.store, "the test", types=True)
    inputs = inputs_for(compiled)
    with compiled.disabled():
        plain = outputs_of(compiled, inputs)
    assert same_bits(plain, outputs_of(tiny(family), inputs))
    assert largest_difference(outputs_of(compiled, inputs), plain) > 1e-3
    compiled.train()
    torch.stack([t.float().square().sum() for t in _floats(compiled(**inputs))]).sum().backward()
    trained = trainable(compiled)
    assert trained
    # A later span of the last layer reaches no output if the output is read from the first token.
    last = {name for name in trained if kind == "split" and ".graftc.b." in name and ".1." in name}
    assert all(p.grad is not None for p in trained.values())
    assert all(bool(p.grad.abs().max() > 0) for name, p in trained.items() if name not in last)


def _floats(outputs: Any) -> list[Tensor]:

    return floats(outputs)


@pytest.mark.full
@pytest.mark.parametrize("base", BASES)
def test_an_average_of_equals_is_one_of_them(base: str) -> None:
    """This holds for averages of outputs and of parameters, also with other weights that add up to one."""
    for compose in (KINDS["average"], KINDS["average of parameters"], {"average": ["a", "b"], "weights": [0.25, 0.75]}):
        compiled = composed("gpt2", BASES[base], compose)
        tensors = compiled.adapter_state_dict()
        compiled.load_adapter_state_dict({n: tensors[n.replace(".graftc.b.", ".graftc.a.")] for n in tensors})
        inputs = inputs_for(compiled)
        expected = outputs_of(alone(compiled, "gpt2", BASES[base], "a"), inputs)
        assert largest_difference(outputs_of(compiled, inputs), expected) <= 2e-6


def test_an_average_of_outputs_is_the_average_of_updates() -> None:
    """The result for low-rank updates of one layer equals that of the matrices, in float64."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 10)).double()
    entry = {"method": "lora", "rank": 2, "alpha": 4, "target": {"modules": "0"}}
    x = torch.randn(5, 6, dtype=torch.float64)
    spec = {"adapt": [{**entry, "name": n} for n in "ab"], "compose": {"average": ["a", "b"], "weights": [0.3, 0.9]}}
    compiled = graftc.compile(spec, model, {"input": x}).eval()
    perturb(compiled, 0.5)
    tensors = compiled.adapter_state_dict()
    update = sum(w * 2 * tensors[f"0.graftc.{n}.B"] @ tensors[f"0.graftc.{n}.A"] for n, w in (("a", 0.3), ("b", 0.9)))
    torch.testing.assert_close(compiled(x), model(x) + x @ update.T, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_an_average_of_parameters_folds(family: str) -> None:
    """``(sum w B) (sum w A)`` folds with a certificate, as a single adaptation."""
    compiled = composed(family, LORA, {"average": ["a", "b"], "of": "parameters", "weights": [0.3, 0.9]})
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    merged = compiled.merge()
    assert merged.certificate.passed
    assert set(merged.folded) == {"average", "a", "b"}
    assert largest_difference(outputs_of(merged, inputs), before) <= 2e-5


@pytest.mark.full
@pytest.mark.parametrize("kind", ["average", "fuse", "gate", "split"])
def test_what_goes_through_a_composition_stays(kind: str) -> None:
    """Merging raises GC050; `merge_partially` folds another adaptation below it and keeps the outputs."""
    spec = {
        "adapt": [{**LORA, "name": "below", "target": {"role": "ffn.up"}}, *({**PFEIFFER, "name": n} for n in "ab")],
        "compose": KINDS[kind],
    }
    compiled = graftc.compile(spec, tiny("bert")).eval()
    perturb(compiled, 0.05)
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC050"
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    partial = compiled.merge_partially()
    assert partial.folded == ("below",)
    assert {"a", "b"} <= set(partial.kept)
    assert largest_difference(outputs_of(partial.compiled.eval(), inputs), before) <= 2e-5


@pytest.mark.slow
def test_fusion_trains_itself_alone() -> None:
    """The adaptations do not train, and the distance of the values from the identity is part of the objective."""
    compiled = composed("bert", PFEIFFER, {"fuse": ["a", "b"]})
    trained = [name for name, p in compiled.named_parameters() if p.requires_grad]
    assert trained and all(".graftc.fuse." in name for name in trained)
    width = compiled.config.hidden_size
    assert compiled.report.trainable_parameters == 2 * (3 * width * width + 2 * width)
    values = [t for n, t in compiled.named_parameters() if n.endswith(".value")]
    expected = 0.01 * sum((v - torch.eye(width)).square().sum() for v in values)
    torch.testing.assert_close(compiled.extra_loss(), expected)
    with pytest.warns(graftc.GraftWarning, match="fuse"):
        _step(compiled)
        compiled.after_step()
        _step(compiled)
        compiled.after_step()


def _step(compiled: Compiled) -> None:
    compiled.train()
    optimiser = adamw(compiled, lr=1e-2)
    inputs = inputs_for(compiled)
    compiled(**inputs)[0].square().sum().backward()
    optimiser.step()


@pytest.mark.full
def test_fusion_of_trained_adapters_exports(tmp_path: Path) -> None:
    """Two adapters are trained separately and fused, and the fusion is trained and run in ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    tensors: dict[str, Tensor] = {}
    for name in "ab":
        one = graftc.compile({"adapt": [{**PFEIFFER, "name": name}]}, tiny("bert"))
        for _ in range(3):
            _step(one)
        tensors |= one.adapter_state_dict()
    spec = {"adapt": [{**PFEIFFER, "name": n} for n in "ab"], "compose": {"fuse": ["a", "b"]}}
    fused = graftc.compile(spec, tiny("bert"))
    fused.load_adapter_state_dict({**fused.adapter_state_dict(), **tensors})
    start = fused.adapter_state_dict()["bert.encoder.layer.0.graftc.fuse.ffn.query"].clone()
    for _ in range(3):
        _step(fused)
    trained = fused.adapter_state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in tensors.items())
    assert not torch.equal(trained["bert.encoder.layer.0.graftc.fuse.ffn.query"], start)
    fused.eval()
    inputs = inputs_for(fused, (3, 8), front=False)
    path = fused.export(tmp_path / "fused.onnx")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    assert largest_difference([torch.from_numpy(outputs[0])], outputs_of(fused, inputs)) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("base", ["lora", "pfeiffer"])
def test_spans(base: str) -> None:
    """Positions in a span get its adapter, tested without attention, so that no position sees another's."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))
    entry = {"method": "lora", "rank": 2, "target": {"modules": "2"}}
    if base == "pfeiffer":
        entry = {"method": "bottleneck", "bottleneck": 3, "target": {"modules": "2"}}
    x = torch.randn(3, 7, 6)
    spec = {"adapt": [{**entry, "name": n} for n in "abc"], "compose": {"split": ["a", "b", "c"], "at": [2, 5]}}
    compiled = graftc.compile(spec, model, {"input": x}).eval()
    perturb(compiled, 0.3)
    actual, tensors = compiled(x), compiled.adapter_state_dict()
    for name, span in (("a", slice(0, 2)), ("b", slice(2, 5)), ("c", slice(5, None))):
        own = graftc.compile({"adapt": [{**entry, "name": name}]}, model, {"input": x}).eval()
        own.load_adapter_state_dict({fqn: tensors[fqn] for fqn in own.adapter_state_dict()})
        torch.testing.assert_close(actual[:, span], own(x)[:, span], rtol=0, atol=1e-6)
        assert largest_difference([own(x)], [actual]) > 1e-3
    short = x[:, :2]
    torch.testing.assert_close(compiled(short), actual[:, :2], rtol=0, atol=1e-6)


@pytest.mark.full
class TestGates:
    """Gates: numbers between 0 and 1 for each row, place and adaptation."""

    @staticmethod
    def numbers(compiled: Compiled, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return every gate of a call."""
        program = compiled.compilation.program("eval")
        gates = [n for n in program.graph.nodes if (provenance(n) or {}).get("part") == "gate"]
        last = [n for n in gates if n.target in (torch.ops.aten.div.Tensor, torch.ops.aten.mean.dim)]
        assert last
        store, values = compiled.compilation.store, {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                values[node] = inputs[node.target]
            elif node.op == "get_attr":
                values[node] = store.get(node.target)
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
        return [values[node] for node in last]

    @pytest.mark.parametrize("base", BASES)
    def test_range(self, base: str) -> None:
        """There is one number for each row, between 0 and 1, and near a half at first."""
        compiled = graftc.compile(
            {"adapt": [{**BASES[base], "name": "a"}], "compose": {"gate": ["a"]}}, tiny("gpt2")
        ).eval()
        inputs = inputs_for(compiled, (4, 6))
        with torch.no_grad():
            first = self.numbers(compiled, inputs)
        assert all(gate.shape == (4, 1) for gate in first)
        assert all(bool(((gate > 0.3) & (gate < 0.7)).all()) for gate in first)
        perturb(compiled, 2.0)
        with torch.no_grad():
            later = torch.cat(self.numbers(compiled, inputs))
        assert bool(((later >= 0) & (later <= 1)).all())
        assert float((later - 0.5).abs().max()) > 0.2

    @pytest.mark.parametrize("base", BASES)
    def test_open_and_shut(self, base: str) -> None:
        """At 1 the result is that of the adaptation alone, at 0 that of the base."""
        compiled = composed("bert", BASES[base], {"gate": ["a"]}, names="a")
        inputs = inputs_for(compiled)
        alone_ = outputs_of(alone(compiled, "bert", BASES[base], "a"), inputs)
        for bias, expected in ((60.0, alone_), (-200.0, outputs_of(tiny("bert"), inputs))):
            tensors = compiled.adapter_state_dict()
            compiled.load_adapter_state_dict(
                {n: torch.full_like(t, bias) if n.endswith("gate_bias") else t for n, t in tensors.items()}
            )
            assert largest_difference(outputs_of(compiled, inputs), expected) <= 1e-6

    def test_padding(self) -> None:
        """A mean over real tokens does not depend on the length of the padding; one over all tokens does."""
        for tokens, moves in (("real", False), ("all", True)):
            compiled = composed("bert", PFEIFFER, {"gate": ["a"], "tokens": tokens}, names="a")
            ids = torch.randint(5, 50, (2, 6))
            mask = torch.ones_like(ids)
            longer = {
                "input_ids": torch.cat([ids, torch.zeros(2, 4, dtype=torch.int64)], 1),
                "attention_mask": torch.cat([mask, torch.zeros(2, 4, dtype=torch.int64)], 1),
            }
            difference = largest_difference(
                outputs_of(compiled, {"input_ids": ids, "attention_mask": mask}), outputs_of(compiled, longer)
            )
            assert (difference > 1e-5) if moves else (difference <= 1e-6)

    def test_counts(self) -> None:
        """A gate has ``width + 1`` numbers for each place."""
        plain = graftc.compile({"adapt": [PFEIFFER, LORA]}, tiny("bert")).report.trainable_parameters
        spec = {"adapt": [PFEIFFER, LORA], "compose": {"gate": ["pfeiffer", "lora"]}}
        compiled = graftc.compile(spec, tiny("bert"))
        width = compiled.config.hidden_size
        assert compiled.report.trainable_parameters - plain == (2 + 4) * (width + 1)


class TestGatedPrefix:
    """A gate on prefixed keys and values: one for both, computed from the attention's input."""

    PREFIX: ClassVar[dict[str, Any]] = {"method": "prefix", "length": 3}

    @classmethod
    def gated(cls, family: str, **fields: Any) -> Compiled:
        """Compile a gated prefix in eval mode, perturbed."""
        entry = {**cls.PREFIX, "name": "a", **fields}
        compiled = graftc.compile({"adapt": [entry], "compose": {"gate": ["a"]}}, tiny(family)).eval()
        perturb(compiled, 0.3)
        return compiled

    @staticmethod
    def held_at(compiled: Compiled, bias: float) -> None:
        """Fix every gate at one value, whatever it reads."""
        values = {"gate": 0.0, "gate_bias": bias}
        tensors = compiled.adapter_state_dict()
        compiled.load_adapter_state_dict(
            {
                n: torch.full_like(t, values[p]) if (p := n.rpartition(".")[2]) in values else t
                for n, t in tensors.items()
            }
        )

    @pytest.mark.full
    @pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gpt_neox", "t5", "vit"])
    def test_open_and_shut(self, family: str) -> None:
        """Open, the result is that of the prefix alone; shut, keys are zeros, which still take part in the softmax."""
        compiled, model = self.gated(family), tiny(family)
        inputs = inputs_for(compiled)
        one = graftc.compile({"adapt": [{**self.PREFIX, "name": "a"}]}, model).eval()
        tensors = {n: t for n, t in compiled.adapter_state_dict().items() if n in one.adapter_state_dict()}
        for bias, factor in ((60.0, 1.0), (-200.0, 0.0)):
            self.held_at(compiled, bias)
            one.load_adapter_state_dict({n: factor * t for n, t in tensors.items()})
            assert largest_difference(outputs_of(compiled, inputs), outputs_of(one, inputs)) <= 1e-6
        assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 1e-3

    @pytest.mark.slow
    def test_each_row_has_its_own(self) -> None:
        """A row alone has the same outputs as in a batch, so its gate reads no other rows."""
        compiled = self.gated("bert")
        inputs = inputs_for(compiled, (4, 6))
        every = outputs_of(compiled, inputs)
        for row in range(4):
            own = outputs_of(compiled, {name: tensor[row : row + 1] for name, tensor in inputs.items()})
            assert largest_difference(own, [tensor[row : row + 1] for tensor in every]) <= 1e-6

    @pytest.mark.full
    def test_counts_and_what_is_deployed(self) -> None:
        """Each attention has ``width + 1`` more numbers, which remain without the network that computes the keys."""
        compiled = self.gated("bert", reparameterization={"hidden": 8})
        plain = graftc.check({"adapt": [{**self.PREFIX, "reparameterization": {"hidden": 8}}]}, tiny("bert"))
        assert compiled.report.trainable_parameters - plain.trainable_parameters == 2 * 49
        assert compiled.report.deployed_parameters == plain.deployed_parameters + 2 * 49
        deployed = compiled.merge_partially().compiled.eval()
        assert deployed.report.trainable_parameters == compiled.report.deployed_parameters
        inputs = inputs_for(compiled)
        assert largest_difference(outputs_of(deployed, inputs), outputs_of(compiled, inputs)) <= 2e-6


@pytest.mark.full
@pytest.mark.parametrize(
    "compose", [{"gate": ["a", "b"]}, {"average": ["a", "b"], "of": "outputs"}], ids=["gate", "average"]
)
def test_what_happens_between_steps_happens_in_a_composition(compose: dict[str, Any]) -> None:
    """Each member counts its steps, and AdaLoRA reduces ranks."""
    entry = {"method": "adalora", "rank": 3, "target_rank": 1, "target": {"role": "attn.{q,v}"}}
    entry |= {"warmup_steps": 1, "final_steps": 1, "interval": 1}
    spec = {"adapt": [{**entry, "name": name} for name in ("a", "b")], "compose": {**compose, "name": "both"}}
    compiled = graftc.compile(spec, tiny("bert")).train()
    compiled.begin(total_steps=4)
    optimiser = torch.optim.Adam([p for p in compiled.parameters() if p.requires_grad], lr=0.1)
    for _ in range(4):
        compiled.zero_grad()
        loss = compiled(**inputs_for(compiled, (4, 6))).logits.square().mean()
        (loss + compiled.extra_loss()).backward()
        optimiser.step()
        compiled.after_step()
    state = compiled.adapter_state_dict()
    for name in ("a", "b"):
        assert int(state[f"graftc.{name}.step"]) == 4
        assert sum(int(live.sum()) for live in compiled.rank_pattern(name).values()) == 4 * 1


@pytest.mark.slow
def test_a_gate_has_no_name_of_the_members_own() -> None:
    entries = [{"method": "sora", "rank": 3, "name": name, "target": {"role": "attn.q"}} for name in ("a", "b")]
    with pytest.raises(GraftError, match=r"'a' .sora. already has a tensor named 'gate'") as caught:
        graftc.compile({"adapt": entries, "compose": {"gate": ["a", "b"]}}, tiny("bert"))
    assert caught.value.code == "GC036"


@pytest.mark.full
def test_order_of_a_stack() -> None:
    """A stack determines the order, whatever the order in the document."""
    entries = {n: {**HOULSBY, "name": n} for n in "ab"}
    first = graftc.compile({"adapt": [entries["a"], entries["b"]]}, tiny("bert")).eval()
    perturb(first, 0.2)
    inputs = inputs_for(first)
    stacked = graftc.compile({"adapt": [entries["b"], entries["a"]], "compose": {"stack": ["a", "b"]}}, tiny("bert"))
    turned = graftc.compile({"adapt": [entries["b"], entries["a"]]}, tiny("bert"))
    for other in (stacked, turned):
        other.load_adapter_state_dict(first.adapter_state_dict())
    assert same_bits(outputs_of(stacked, inputs), outputs_of(first, inputs))
    assert largest_difference(outputs_of(turned, inputs), outputs_of(first, inputs)) > 1e-4


@pytest.mark.full
def test_a_composition_in_a_stack() -> None:
    """A fusion can be stacked on a language's adapter, as in MAD-X."""
    spec = {
        "adapt": [{**PFEIFFER, "name": n} for n in ("x", "y", "language")],
        "compose": [{"fuse": ["x", "y"], "name": "tasks"}, {"stack": ["language", "tasks"]}],
    }
    compiled = graftc.compile(spec, tiny("bert")).eval()
    assert [unit.name for unit in compiled.compilation.units] == ["language", "tasks"]


REFUSED: Mapping[str, tuple[dict[str, Any], str, str]] = {
    "other places": (
        {
            "adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b", "target": {"role": "attn.q"}}],
            "compose": KINDS["fuse"],
        },
        "GC036",
        "have different places",
    ),
    "other values": (
        {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b", "rank": 4}], "compose": {"bank": ["a", "b"]}},
        "GC036",
        "'b' and 'a' differ in rank",
    ),
    "other wirings": (
        {
            "adapt": [{**PFEIFFER, "name": "a"}, {**HOULSBY, "name": "b", "target": {"role": "ffn.sublayer"}}],
            "compose": KINDS["average"],
        },
        "GC036",
        "do not all read from and add to the same values",
    ),
    "nothing added": (
        {"adapt": [{"method": "ia3", "name": n} for n in "ab"], "compose": KINDS["average"]},
        "GC036",
        "does not only add to values",
    ),
    "keys in front": (
        {"adapt": [{"method": "prefix", "length": 2, "name": n} for n in "ab"], "compose": KINDS["average"]},
        "GC036",
        "puts keys and values in front",
    ),
    "no bank": (
        {"adapt": [{**LORA, "method": "adalora", "name": n} for n in "ab"], "compose": {"bank": ["a", "b"]}},
        "GC036",
        "adalora cannot share a bank",
    ),
    "no such part": (
        {"adapt": [{**LORA, "name": n} for n in "ab"], "compose": {"bank": ["a", "b"], "share": ["norm"]}},
        "GC036",
        "lora has no part 'norm'",
    ),
    "overlays": (
        {"adapt": [{**LORA, "name": n, "bias": "lora_only"} for n in "ab"], "compose": KINDS["average"]},
        "GC036",
        "trains .* itself",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize(("spec", "code", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_together(spec: dict[str, Any], code: str, message: str) -> None:
    """Each error names the place in the spec."""
    if "adalora" in str(spec):
        for entry in spec["adapt"]:
            entry.pop("rank", None)
    with pytest.raises(GraftError, match=message) as caught:
        graftc.compile(spec, tiny("bert"))
    assert caught.value.code == code
    assert caught.value.place is not None and caught.value.place.path.startswith("compose")


@pytest.mark.full
def test_artifact_and_inspection(tmp_path: Path) -> None:
    """After saving and loading, and when inspected, tensors of a composition have an origin like all others."""
    model = tiny("bert")
    spec = {"adapt": [{**PFEIFFER, "name": n} for n in "ab"], "compose": {"fuse": ["a", "b"], "name": "tasks"}}
    compiled = graftc.compile(spec, model).eval()
    perturb(compiled, 0.05)
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", model=model).eval()
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    assert loaded.compilation.spec == compiled.compilation.spec
    assert "tasks" in str(compiled.explain("bert.encoder.layer.0.graftc.tasks.ffn.query"))
    assert "tasks" in str(compiled.tree())
    entry = next(a for a in compiled.report.adaptations if a.name == "tasks")
    assert entry.method == "fuse" and entry.sites == 2 and entry.trainable_parameters > 0
