"""AdaMix: random routes in training, averaged experts in eval mode, and the relation between the two."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.core.ir.routes import is_pick, is_route
from graftc.runtime.export.job import deployed
from graftc.runtime.loading.verify import verify
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.deployment import check_onnx
from graftc.testing.families import bert
from tests.kit.comparing import floats, gradients_of
from tests.kit.models import fresh, still

LORA: dict[str, Any] = {"method": "adamix_lora", "target": {"role": ["attn.q", "ffn.down"]}, "dropout": 0, "rank": 3}
ADAMIX: dict[str, Any] = {"method": "adamix", "bottleneck": 5}
ENTRIES = pytest.mark.parametrize("entry", [ADAMIX, LORA], ids=["adamix", "adamix_lora"])


def trained(compiled: Any, inputs: Any, seed: int) -> list[Tensor]:
    """The outputs of one pass in train mode."""
    torch.manual_seed(seed)
    compiled.train()
    with torch.no_grad():
        return floats(compiled(**inputs))


def equalise(compiled: Any) -> None:
    """Give all experts the tensors of the first one."""
    shared = {"none": (), "up": ("up", "up_bias", "B"), "down": ("down", "down_bias", "A")}
    spec = compiled.spec.adapt[0]
    for name, tensor in compiled.adapter_state_dict().items():
        if name.rpartition(".")[2] not in shared[spec.share]:
            tensor.copy_(tensor[0].clone().expand_as(tensor))


@pytest.mark.full
@ENTRIES
@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_equal_experts_are_one(entry: dict[str, Any], share: str) -> None:
    """With equal experts, all passes in train mode agree with eval mode; with different experts, passes differ."""
    compiled = fresh(still("bert"), {**entry, "share": share})
    perturb(compiled)
    inputs = inputs_for(compiled)
    passes = [trained(compiled, inputs, seed) for seed in range(6)]
    assert any(largest_difference(passes[0], other) > 1e-3 for other in passes[1:])
    equalise(compiled)
    passes = [trained(compiled, inputs, seed) for seed in range(6)]
    assert all(same_bits(passes[0], other) for other in passes[1:])
    assert largest_difference(passes[0], outputs_of(compiled, inputs)) <= 2e-6


@pytest.mark.full
@ENTRIES
def test_eval_is_the_mean_of_experts(entry: dict[str, Any]) -> None:
    """The simpler adaptation with the arithmetic mean of every tensor gives the eval outputs."""
    compiled = fresh(still("bert"), {**entry, "share": "none", "experts": 3})
    perturb(compiled)
    simple = deployed(runner_of(compiled))
    assert simple.spec.adapt[0].method == {"adamix": "bottleneck", "adamix_lora": "lora"}[entry["method"]]
    state = compiled.adapter_state_dict()
    simple_state = simple.module.adapter_state_dict()
    assert state.keys() == simple_state.keys()
    for name, tensor in simple_state.items():
        assert torch.equal(tensor, state[name].double().mean(0).float()), name
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(simple.module, inputs), outputs_of(compiled, inputs)) <= 2e-6


@pytest.mark.full
def test_experts_start_different_or_alike() -> None:
    """Adapters start normal with standard deviation 0.02, drawn independently; low-rank copies start equal and diverge
    through routing.
    """
    state = fresh(still("bert"), {**ADAMIX, "bottleneck": 40}).adapter_state_dict()
    for name, tensor in state.items():
        if name.endswith(".down"):
            assert tensor.shape == (4, 40, 48) and abs(float(tensor.std()) - 0.02) < 2e-3
            assert all((a - b).abs().mean() > 0.01 for a, b in itertools.combinations(tensor, 2))
        if name.endswith(".up"):
            assert tensor.shape == (48, 40)
        if name.endswith("_bias"):
            assert not tensor.any()
    compiled = fresh(still("bert"), {**LORA, "share": "none"})
    state = compiled.adapter_state_dict()
    for name, tensor in state.items():
        assert tensor.shape[0] == 8 and all(torch.equal(tensor[0], expert) for expert in tensor), name
        assert tensor.any() == name.endswith(".A")
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1)
    compiled.train()
    torch.manual_seed(0)
    for _ in range(3):
        optimiser.zero_grad()
        compiled(**inputs_for(compiled), labels=torch.arange(5) % 3).loss.backward()
        optimiser.step()
    assert any(not torch.equal(b[0], b[7]) for name, b in compiled.adapter_state_dict().items() if name.endswith(".B"))


@pytest.mark.slow
def test_the_expected_product_is_the_product_of_the_means() -> None:
    """`E[B_j A_i] = mean(B) mean(A)` over all pairs, and this product is folded."""
    compiled = fresh(still("bert"), {**LORA, "share": "none", "experts": 3, "alpha": 5})
    perturb(compiled)
    lazy = lazy_tensors(compiled.compilation)
    for name in (n for n in lazy.names if n.endswith("weight")):
        prefix = name.removesuffix("weight") + "graftc.adamix_lora."
        a, b = (compiled.adapter_state_dict()[prefix + part].double() for part in "AB")
        pairs = torch.stack([second @ first for first in a for second in b])
        base = compiled.compilation.store.get(name).detach().double()
        torch.testing.assert_close(lazy.exact(name) - base, 5 / 3 * pairs.mean(0), rtol=0, atol=1e-14)
        assert pairs.std(0).max() > 0.01
    merged = compiled.merge()
    assert merged.certificate.passed
    collapses = merged.certificate.collapses
    assert len(collapses) == 4 and all(item.routings == 9 and item.error <= 1e-13 for item in collapses)


def draws(compiled: Any, passes: int) -> dict[tuple[str, str], list[int]]:
    """Return the expert of each tensor that had a gradient in each pass, by site and projection."""
    experts = {name: p for name, p in compiled.named_parameters() if name.endswith((".down", ".up", ".A", ".B"))}
    drawn: dict[tuple[str, str], list[int]] = {}
    inputs = inputs_for(compiled)
    compiled.train()
    torch.manual_seed(3)
    for _ in range(passes):
        compiled.zero_grad()
        compiled(**inputs)[0].square().sum().backward()
        for name, parameter in experts.items():
            gradient = parameter.grad.flatten(1).abs().amax(1)
            assert int((gradient > 0).sum()) == 1, "one expert takes part in a pass"
            site, _, part = name.rpartition(".")
            drawn.setdefault((site, part), []).append(int(gradient.argmax()))
    return drawn


@pytest.mark.full
@pytest.mark.parametrize("entry", [{**ADAMIX, "target": {"role": "ffn.sublayer"}}, LORA], ids=["adamix", "lora"])
def test_routes_are_independent(entry: dict[str, Any]) -> None:
    """Routes are uniform for each projection, and independent between projections, between sites and between passes."""
    quiet = {"consistency": {"weight": 0}, "share": "none", "experts": 3}
    compiled = fresh(still("bert"), {**entry, **quiet})
    perturb(compiled)
    passes = 360
    routes = draws(compiled, passes)
    assert len(routes) == {"adamix": 4, "adamix_lora": 8}[entry["method"]]
    for sequence in routes.values():
        assert chi_square([sequence.count(i) for i in range(3)]) < 20  # 2 degrees of freedom: one in 20,000
    for (_, first), (_, second) in itertools.combinations(routes.items(), 2):
        pairs = list(zip(first, second, strict=True))
        assert chi_square([pairs.count(pair) for pair in itertools.product(range(3), repeat=2)]) < 40  # 8 degrees
    for sequence in routes.values():  # and each pass is independent of the one before
        pairs = list(itertools.pairwise(sequence))
        assert chi_square([pairs.count(pair) for pair in itertools.product(range(3), repeat=2)]) < 40


def chi_square(counts: list[int]) -> float:
    """Return the chi-square statistic of the counts against equal probabilities."""
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.full
def test_one_draw_for_each_site_and_projection() -> None:
    """Weight and bias come from one expert; shared tensors have no draw, and eval mode has none at all."""
    for share, each in (("up", 1), ("none", 2)):
        program = fresh(still("bert"), {**ADAMIX, "share": share}).program("train")
        assert sum(is_route(n) for n in program.graph.nodes) == 2 * each
        assert sum(is_pick(n) for n in program.graph.nodes) == 4 * each
    for entry in (ADAMIX, LORA):
        program = fresh(still("bert"), entry).program("eval")
        assert not any(is_route(n) or is_pick(n) for n in program.graph.nodes)


@pytest.mark.full
@ENTRIES
def test_checkpointing_keeps_the_draws(entry: dict[str, Any]) -> None:
    """A layer that is recomputed in the backward pass uses the same experts and dropout, so the gradients are equal."""
    first, second = fresh(still("bert"), entry), fresh(still("bert"), entry, checkpoint="layers")
    perturb(first)
    second.load_adapter_state_dict(first.adapter_state_dict())
    gradients = []
    for compiled in (first, second):
        compiled.train()
        torch.manual_seed(5)
        compiled(**inputs_for(compiled), labels=torch.arange(5) % 3).loss.backward()
        gradients.append(gradients_of(compiled))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-6)


@pytest.mark.full
def test_collapse_evidence_is_measured() -> None:
    """The error is the distance between the mean over all pairs and the mean adapter; no budget applies to it."""
    compiled = fresh(still("bert"), {**ADAMIX, "share": "none", "experts": 2, "bottleneck": 3})
    perturb(compiled)
    certificate = compiled.merge_partially().certificate
    assert certificate.passed and not certificate.sites
    state = {n: t.double() for n, t in compiled.adapter_state_dict().items()}
    names = [n.removesuffix("down") for n in state if n.endswith(".down")]
    assert len(names) == len(certificate.collapses) == 2
    x = torch.randn(20000, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run(prefix: str, i: int | None, j: int | None) -> Tensor:
        down, first, up, last = (state[prefix + p] for p in ("down", "down_bias", "up", "up_bias"))
        hidden = torch.nn.functional.gelu(x @ pick(down, i).T + pick(first, i))
        return hidden @ pick(up, j).T + pick(last, j)

    def pick(experts: Tensor, number: int | None) -> Tensor:
        return experts.mean(0) if number is None else experts[number]

    for prefix, item in zip(names, certificate.collapses, strict=True):
        pairs = torch.stack([run(prefix, i, j) for i in range(2) for j in range(2)]).mean(0)
        deployed = run(prefix, None, None)
        expected = float((pairs - deployed).abs().max() / deployed.abs().max())
        assert item.routings == 4 and expected / 4 < item.error < expected * 4
    equalise(compiled)
    assert all(item.error < 1e-14 for item in compiled.merge_partially().certificate.collapses)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_merging_partially_leaves_one_adapter(family: str, tmp_path: Path) -> None:
    """AdaMix does not fold but collapses to the plain adapter, which an artifact keeps; a LoRA beside it folds."""
    for others in ([], [{"method": "lora", "target": {"role": "attn.q"}}]):
        compiled = fresh(still(family), {**ADAMIX, "experts": 3}, *others)
        perturb(compiled)
        partial = compiled.merge_partially()
        assert partial.folded == tuple(entry["method"] for entry in others) and set(partial.kept) == {"adamix"}
        (left,) = partial.compiled.spec.adapt
        assert (left.method, left.name) == ("bottleneck", "adamix")
        inputs = inputs_for(compiled)
        expected = outputs_of(compiled, inputs)
        assert largest_difference(outputs_of(partial.compiled, inputs), expected) <= 2e-5
        report = partial.compiled.report
        assert report.trainable_parameters == report.deployed_parameters
        assert report.deployed_parameters == compiled.report.deployed_parameters - sum(
            entry.trainable_parameters for entry in compiled.report.adaptations if entry.method == "lora"
        )
        path = tmp_path / f"{family}{len(others)}"
        partial.save(path)
        assert same_bits(outputs_of(graftc.load(path), inputs), outputs_of(partial.compiled, inputs))
        assert verify(path).passed


@pytest.mark.full
@pytest.mark.parametrize("kind", ["average", "fuse"])
@pytest.mark.parametrize("entry", [ADAMIX, {**LORA, "share": "none", "experts": 3}], ids=["adamix", "adamix_lora"])
def test_in_a_composition(entry: dict[str, Any], kind: str) -> None:
    """Members of a composition collapse in place, each with its own evidence."""
    members = [{**entry, "name": name} for name in ("one", "two")]
    compiled = fresh(still("bert"), *members, compose={kind: ["one", "two"]})
    perturb(compiled)
    partial = compiled.merge_partially()
    evidence = partial.certificate.collapses
    assert {item.adaptation for item in evidence} == {"one", "two"}
    assert all((item.error < 1e-12) is (entry["method"] == "adamix_lora") for item in evidence)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(partial.compiled, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
def test_merging_refuses_adapters_and_names_them() -> None:
    """Merging raises GC050, as for every bottleneck adapter."""
    compiled = fresh(still("bert"), ADAMIX)
    with pytest.raises(GraftError, match="'adamix' cannot fold") as caught:
        compiled.merge()
    assert caught.value.code == "GC050"


@pytest.mark.full
@ENTRIES
def test_an_artifact_keeps_every_expert(entry: dict[str, Any], tmp_path: Path) -> None:
    """A loaded artifact has the same tensors, outputs and training passes."""
    compiled = fresh(still("bert"), entry)
    perturb(compiled)
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", still("bert"))
    state = loaded.adapter_state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in compiled.adapter_state_dict().items())
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    assert same_bits(trained(loaded, inputs, 2), trained(compiled, inputs, 2))


@pytest.mark.full
def test_exports_hold_the_mean(tmp_path: Path) -> None:
    """ONNX and `.pt2` files contain no tensor with experts, and record their spec."""
    compiled = fresh(still("bert"), {**ADAMIX, "experts": 3, "share": "none"})
    perturb(compiled)
    import onnx

    path = compiled.export(tmp_path / "model.onnx")
    check_onnx(path, compiled, (4, 9), 1e-4)
    shapes = [list(t.dims) for t in onnx.load(path).graph.initializer]
    assert shapes.count([3, 5, 48]) == shapes.count([3, 48, 5]) == 0
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert "method: bottleneck" in metadata["graftc.spec"]
    inputs = inputs_for(compiled, (4, 9))
    program = torch.export.load(compiled.export(tmp_path / "model.pt2", "pt2"))
    assert all(tuple(t.shape) != (3, 5, 48) for t in program.state_dict.values())
    outputs = floats(program.module()(**inputs))
    assert largest_difference(outputs, outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.full
def test_the_deployed_count_does_not_depend_on_experts() -> None:
    """The counts follow from shapes, on the meta device as well."""
    seen = set()
    for experts, share in itertools.product((1, 2, 7), ("up", "down", "none")):
        with torch.device("meta"):
            model = bert()
        entries = [{**ADAMIX, "experts": experts, "share": share}, {**LORA, "experts": experts, "share": share}]
        report = graftc.check({"adapt": entries}, model)
        seen.add(report.deployed_parameters)
        assert (report.trainable_parameters > report.deployed_parameters) == (experts > 1)
    assert len(seen) == 1
    assert seen == {2 * (2 * 48 * 5 + 48 + 5) + 2 * 3 * (48 + 48) + 2 * 3 * (80 + 48)}


@pytest.mark.full
def test_overrides_go_with_the_collapse() -> None:
    """A site with its own width or scale keeps it."""
    overrides = [{"modules": "**.layer.0.**", "reduction": 4, "scale": 0.5}]
    compiled = fresh(still("bert"), {**ADAMIX, "overrides": overrides, "init_std": 0.03})
    perturb(compiled)
    partial = compiled.merge_partially()
    widths = [t.shape[0] for n, t in partial.compiled.adapter_state_dict().items() if n.endswith(".down")]
    assert widths == [12, 5]
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(partial.compiled, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
def test_the_certificate_says_it_in_json() -> None:
    """The JSON of a certificate lists adaptation, site, number of routings and error of each collapse."""
    compiled = fresh(still("bert"), {**ADAMIX, "experts": 3})
    perturb(compiled)
    data = json.loads(json.dumps(compiled.merge_partially().certificate.to_json()))
    assert [entry["routings"] for entry in data["collapses"]] == [3, 3]
    assert all(0 < entry["error"] < math.inf and entry["adaptation"] == "adamix" for entry in data["collapses"])


def test_values_that_do_not_fit() -> None:
    """Values that do not fit are refused as in other methods, with GC002 and GC020."""
    with pytest.raises(GraftError, match="is too large for"):
        fresh(still("bert"), {**LORA, "rank": 49})
    for entry in ({**ADAMIX, "experts": 0}, {**ADAMIX, "share": "both"}, {**LORA, "consistency": {"weight": -1}}):
        with pytest.raises(GraftError):
            graftc.load_spec({"adapt": [entry]})


@pytest.mark.full
@pytest.mark.slow
def test_exports_warn_of_nothing_new(tmp_path: Path) -> None:
    """A warning from compiling is not repeated on export."""
    with pytest.warns(GraftWarning, match="GC024"):
        compiled = fresh(still("gpt2"), {**LORA, "target": {"role": "embed"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        deployed(runner_of(compiled))
