"""Inputs and outputs of layers as sites: found in every family, and replacements reach every reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graftc
from graftc.compiler.capture.capture_cache import captured
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.example_inputs import random_inputs
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.roles.structure import find_structure
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.program import map_nodes
from graftc.passes.core.sites.sites import LinearSite, SublayerSite, ValueSite
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import FAMILIES, perturb
from graftc.testing.families import tiny
from tests.kit.wide import FAMILIES as WIDE


def table(model: nn.Module) -> SiteTable:
    """Return the sites of a model's usual signature."""
    store = Store.mirror(model)
    result = captured(CaptureRequest.of(model, default_axes(model), aliases=store.aliases))
    for name, tensor in result.constants.items():
        store.add_constant(name, tensor)
    return SiteTable(
        result.program, store, find_structure(result.program.graph, result.constants), dict(model.named_modules())
    )


def values_of(site_table: SiteTable, role: str) -> list[list[ValueSite]]:
    """Return the uses of every place with a role."""
    places: list[list[ValueSite]] = []
    for sites in site_table.entries:
        if isinstance(sites[0], ValueSite) and sites[0].roles[0].endswith(role):
            places.append([site for site in sites if isinstance(site, ValueSite)])
    return places


def run(site_table: SiteTable, also: Mapping[str, Tensor] | None = None) -> dict[fx.Node, Any]:
    """Compute every value of the graph, in train mode with one draw of dropout."""
    inputs = iter(random_inputs(site_table.program, site_table.store, 3, (3, 6, 5)).values())
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        for node in site_table.program.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                name = str(node.target)
                values[node] = (also or {}).get(name, site_table.store.get(name))
            elif node.op == "call_function":
                args = map_nodes((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = node.target(*args[0], **args[1])
            else:
                values[node] = [values[n] for n in node.all_input_nodes]
    return values


def add_to(site_table: SiteTable, site: ValueSite, value: Tensor) -> None:
    """Replace the value by its sum with ``value: [width]``."""
    build = Builder(site_table.program, site_table.store, "more", "test")
    with build.on(site):
        own = build.constant("vector", lambda: value)
        build.set_value(site, build.call(torch.ops.aten.add.Tensor, build.value(site), own, part="add"))


def stream_of(values: Mapping[fx.Node, Any], sublayers: Sequence[SublayerSite]) -> Tensor:
    """Return the stream that the first branches of a layer are added to."""
    left: Tensor = values[sublayers[0].sum]
    for sublayer in sublayers:
        left = left - values[sublayer.branch] if sublayer.sum is sublayers[0].sum else left
    return left


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_them(family: str) -> None:
    """Every layer has one of each kind, in its own module, and a layer's output is the next one's input."""
    site_table = table(tiny(family))
    ins, outs = values_of(site_table, "layer.in"), values_of(site_table, "layer.out")
    stacks = {"t5": ("encoder.block", "decoder.block")}.get(family) or {sites[0].stack for sites in ins}
    assert len(ins) == len(outs) == 2 * len(stacks)
    for sites in (*ins, *outs):
        (site,) = sites
        assert site.layer in (0, 1) and site.key.module == f"{site.stack}.{site.layer}"
        assert site.key.name == site.roles[0] and site.scope in ("layer_in", "layer_out")
    for stack in stacks:
        mine = [[site for (site,) in group if site.stack == stack] for group in (ins, outs)]
        assert mine[0][1].node is mine[1][0].node
    prefixes = {site.roles[0].partition("layer.")[0] for (site,) in (*ins, *outs)}
    assert prefixes == ({"encoder.", "decoder."} if family == "t5" else {""})


@pytest.mark.parametrize("family", FAMILIES)
def test_adding_zeros_is_the_base(family: str) -> None:
    """With all of them replaced, the outputs are bit-identical."""
    site_table = table(tiny(family))
    before = run(site_table)[site_table.program.output_node]
    for (site,) in (*values_of(site_table, "layer.in"), *values_of(site_table, "layer.out")):
        add_to(site_table, site, torch.zeros(site.width))
    after = run(site_table)[site_table.program.output_node]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_projections_and_the_residual_read_it(family: str) -> None:
    """A vector added at the second layer changes its queries, keys, values and stream, and nothing before."""
    site_table = table(tiny(family))
    for (site,) in values_of(site_table, "layer.in"):
        if site.layer != 1:
            continue
        before = run(site_table)
        vector = torch.linspace(-1, 1, site.width)
        add_to(site_table, site, vector)
        after = run(site_table)
        layer_sites = [sites[0] for sites in site_table.entries if (sites[0].stack, sites[0].layer) == (site.stack, 1)]
        reading = [s for s in layer_sites if isinstance(s, LinearSite) and s.roles]
        own = [s for s in reading if {r.rpartition("attn.")[2] for r in s.roles} & {"q", "k", "v"}]
        own = [s for s in own if not any("cross" in role for role in s.roles)]
        assert len(own) == 3
        assert all((after[s.use.node] - before[s.use.node]).abs().max() > 1e-3 for s in own)
        residual = stream_of(after, [s for s in layer_sites if isinstance(s, SublayerSite)])
        torch.testing.assert_close(residual, before[site.node] + vector)
        assert torch.equal(after[site.node], before[site.node])


def test_what_stands_there_already_is_read() -> None:
    """Two replacements of one value, by the site that ends a layer and the one that begins the next, add up."""
    site_table = table(tiny("gpt2"))
    before = run(site_table)
    (out,), (into,) = values_of(site_table, "layer.out")[0], values_of(site_table, "layer.in")[1]
    add_to(site_table, out, torch.ones(out.width))
    add_to(site_table, into, torch.ones(into.width))
    sublayers = [s[0] for s in site_table.entries if isinstance(s[0], SublayerSite) and s[0].layer == 1]
    torch.testing.assert_close(stream_of(run(site_table), sublayers), before[into.node] + 2)


@pytest.mark.slow
def test_a_layer_that_runs_twice_is_one_place() -> None:
    """The second run of ALBERT's layer reads the output of the first."""
    site_table = table(WIDE["albert"].model())
    (ins,), (outs,) = values_of(site_table, "layer.in"), values_of(site_table, "layer.out")
    assert [site.key.use for site in ins] == [site.key.use for site in outs] == [0, 1]
    assert ins[1].node is outs[0].node and len({site.key.place for site in ins}) == 1


@pytest.mark.slow
def test_same_places_with_other_inputs() -> None:
    """The sites of another table are found by their keys."""
    site_table, other = table(tiny("bert")), table(tiny("bert"))
    for sites in (*values_of(site_table, "layer.in"), *values_of(site_table, "layer.out")):
        assert [site.key for site in other.same(sites[0])] == [site.key for site in sites]


def test_a_method_that_takes_none() -> None:
    """LoRA cannot adapt the input of a layer."""
    with pytest.raises(GraftError, match=r"role 'layer\.in' matches 2 sites \(2 value\)") as caught:
        graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "layer.in"}}]}, tiny("bert"))
    assert caught.value.code == "GC016"


class Recurrence(nn.Module):
    """A layer, 6 wide, with a branch that adds to a state of its own at every step, behind another branch or not."""

    def __init__(self, state: int, branches: int) -> None:
        super().__init__()
        self.turn = nn.Linear(6, 6) if branches == 2 else None
        self.read, self.again, self.write = nn.Linear(6, state), nn.Linear(state, state), nn.Linear(state, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.turn is not None:
            x = x + self.turn(x)
        features = self.read(x)
        state = torch.tanh(features)
        for _ in range(2):
            state = torch.tanh(features + self.again(state))
        result: Tensor = x + self.write(state)
        return result


class Recurrent(nn.Module):
    """Two such layers, each of which runs twice."""

    def __init__(self, state: int, branches: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 6)
        self.layers = nn.ModuleList([Recurrence(state, branches), Recurrence(state, branches)])
        self.head = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(layer(x))
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("state", [4, 6])
def test_a_recurrence_within_a_layer_is_not_a_run_of_it(state: int, branches: int) -> None:
    """Pasta could not be inserted (GC071): the states, 4 wide, counted as further inputs of a layer that is 6 wide."""
    torch.manual_seed(0)
    model, ids = Recurrent(state, branches), torch.tensor([[3, 1, 4, 2], [1, 5, 9, 2]])
    spec = {"adapt": [{"method": "pasta", "special_tokens": [1, 2], "init": "zeros", "dropout": 0.0}]}
    compiled = graftc.compile(spec, model, {"input_ids": ids}, cache=False).eval()
    assert torch.equal(compiled(ids), model(ids))
    vectors = perturb(compiled, 1.0)
    assert {tuple(own.shape) for own in vectors.values()} == {(2, 6)} and len(vectors) == 2
    x = model.embed(ids)
    for layer, own in zip(model.layers, vectors.values(), strict=True):
        added = torch.zeros_like(x)
        added[0, 1], added[0, 3], added[1, 0], added[1, 3] = own[0], own[1], own[0], own[1]
        x = layer(layer(x + added) + added)
    torch.testing.assert_close(compiled(ids), model.head(x))
