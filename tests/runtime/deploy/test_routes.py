"""Merges of models that route among experts are compared on one side's routes, and state what the other chooses."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.route_evidence import Flips, moved, score_noise
from graftc.passes.core.ops.route import RouteChoice, Routes, route
from graftc.passes.core.weights.folds import LazyTensors
from graftc.passes.graph.route_choices import choices_of, route_choices
from graftc.records.certificate import RouteEvidence, routed
from graftc.runtime.deploy import certifying, comparing, folded_runner
from graftc.runtime.deploy.folded_tensors import folded_store
from graftc.runtime.model.evaluation import Evaluation
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tests.kit.models import adapted
from tests.kit.specs import lora
from tests.runtime.deploy.routed import FAMILIES, ROLES, near_twins, routed_model, spec


def with_routes(family: str, dtype: torch.dtype = torch.bfloat16, twins: bool = False) -> Any:
    """A perturbed model; with ``twins``, scores of every three experts of a router are a rounding apart."""
    model = routed_model(family, dtype=dtype)
    if twins:
        near_twins(model)
    return adapted(model, lora(ROLES[:3] if twins else ROLES, rank=4))


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, bool], Any]:
    """Models that tests share, each compiled once."""
    return {}


@pytest.fixture
def twins(request: pytest.FixtureRequest, models: dict[tuple[str, bool], Any]) -> Any:
    """A model of a family with scores that are close to one another."""
    key = (request.param, True)
    return models.setdefault(key, models.get(key) or with_routes(*key[:1], twins=True))


every_twins = pytest.mark.parametrize(
    "twins", [FAMILIES[0], *(pytest.param(family, marks=pytest.mark.full) for family in FAMILIES[1:])], indirect=True
)


@pytest.mark.slow
@every_twins
def test_a_choice_that_rounding_exchanges_is_stated_and_does_not_refuse(twins: Any) -> None:
    before = {name: tensor.clone() for name, tensor in twins.state_dict().items()}
    certificate = twins.merge().certificate
    assert certificate.passed and not certificate.failures()
    assert certificate.largest_difference <= certificate.budget
    assert len(certificate.routes) == 2 and all(route.module.endswith("mlp.gate") for route in certificate.routes)
    assert all(route.choices == 27 and route.passed for route in certificate.routes)
    flipped = [route for route in certificate.routes if route.flips]
    assert flipped and all(0 <= route.gap <= route.bound and route.noise > 0 for route in flipped)
    assert all(torch.equal(before[name], tensor) for name, tensor in twins.state_dict().items())
    (line,) = routed(certificate.routes)
    assert f"{sum(route.flips for route in flipped)} of 54" in line and line in certificate._repr_html_()
    data = json.loads(json.dumps(certificate.to_json()))["routes"]
    assert [item["flips"] for item in data] == [route.flips for route in certificate.routes]


@pytest.mark.slow
@every_twins
def test_a_merged_model_has_the_code_of_its_forward_pass_alone(twins: Any) -> None:
    runner = twins.merge()._graftc
    assert not [key for key in runner.shown.executables if key.entry != "forward"]
    assert not [name for block in runner.blocks.values() for name in block._graftc.functions if "routes" in name]


@pytest.mark.slow
@every_twins
def test_merges_of_one_model_at_once(twins: Any) -> None:
    expected = twins.merge().certificate
    with ThreadPoolExecutor(4) as pool:
        certificates = list(pool.map(lambda _: twins.merge().certificate, range(4)))
    assert all(certificate == expected for certificate in certificates)


@pytest.mark.slow
@every_twins
def test_open_to_routes_the_graph_computes_the_same(twins: Any) -> None:
    inputs = _inputs(twins)
    evaluation, routes = Evaluation(twins._graftc, inputs), Routes()
    with torch.no_grad():
        plain = evaluation.outputs()
        opened = evaluation.outputs(routes)
        imposed = evaluation.outputs(Routes(routes.seen))
    assert len(routes.seen) == 2
    for one, *others in zip(plain, opened, imposed, strict=True):
        assert all(torch.equal(one, other) for other in others)


def _inputs(compiled: Any) -> dict[str, Tensor]:
    from graftc.compiler.capture.example_inputs import random_inputs

    compilation = compiled.compilation
    return random_inputs(compilation.program("train", "base"), compilation.store, config=compiled.config)


Wrong = Callable[[Tensor], Tensor]
ROUTER, DOWN, UP = "gate.weight", "experts.down_proj", "experts.gate_up_proj"


def _one_expert(weight: Tensor) -> Tensor:
    return weight * torch.where(torch.arange(len(weight)) == 2, 1.1, 1.0)[:, None, None]


def _noisy(weight: Tensor) -> Tensor:
    return weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


WRONG: dict[str, tuple[str, Wrong]] = {
    "two experts exchanged": (DOWN, lambda w: w[[1, 0, *range(2, len(w))]]),
    "experts rolled": (UP, lambda w: w.roll(1, 0)),
    "an expert scaled": (DOWN, _one_expert),
    "an expert of zeros": (UP, lambda w: w * (torch.arange(len(w)) != 0)[:, None, None]),
    "a router's rows rolled": (ROUTER, lambda w: w.roll(1, 0)),
    "a router's rows exchanged": (ROUTER, lambda w: w[[2, 1, 0, *range(3, len(w))]]),
    "a router of another sign": (ROUTER, lambda w: -w),
    "a router with noise": (ROUTER, _noisy),
    "a router's columns rolled": (ROUTER, lambda w: w.roll(2, 1)),
}
SMALL = frozenset({"an expert scaled"})
"""Wrong folds that outputs alone do not show in 16 bits."""


def wrong_store(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change tensors after the sites' evidence, which is of the folded ones: only outputs and routes can tell."""
    part, change = WRONG[name]

    def wrong(compilation: Any, fold: Any, lazy: Any, packed: Any, **options: Any) -> Any:
        chosen = {at: t for at, t in lazy.tensors.items() if at.endswith(part)}
        assert chosen
        tensors = {**lazy.tensors, **{at: change(t.float()).to(t.dtype) for at, t in chosen.items()}}
        return folded_store(compilation, fold, replace(lazy, tensors=tensors), packed, **options)

    monkeypatch.setattr(folded_runner, "folded_store", wrong)


def wrong_fold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold wrongly, so that everything computed by the fold's own formula is equally wrong."""
    apply, (part, change) = LazyTensors.apply, WRONG[name]

    def wrong(self: LazyTensors, group: Any, values: dict[str, Tensor]) -> None:
        apply(self, group, values)
        for at in values:
            if at.endswith(part):
                values[at].copy_(change(values[at].clone()))

    monkeypatch.setattr(LazyTensors, "apply", wrong)


ALL_WRONG = [
    (how, family, dtype, name)
    for how in (wrong_store, wrong_fold)
    for family in FAMILIES
    for dtype in (torch.bfloat16, torch.float32)
    for name in WRONG
    if not (how is wrong_store and dtype == torch.bfloat16 and name in SMALL)
]
SAMPLE = [case for case in ALL_WRONG if case[1:3] == (FAMILIES[0], torch.bfloat16)][::3]
WRONG_CASES = [
    pytest.param(*case, id="-".join((case[0].__name__, case[1], str(case[2]), case[3])), marks=marks)
    for case in ALL_WRONG
    for marks in [() if case in SAMPLE else (pytest.mark.full,)]
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "family", "dtype", "name"), WRONG_CASES)
def test_a_wrong_model_is_refused(
    how: Any, family: str, dtype: torch.dtype, name: str, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = (f"{family} {dtype}", False)
    if key not in models:
        models[key] = with_routes(family, dtype)
        assert models[key].merge().certificate.passed
    how(name, monkeypatch)
    with pytest.raises(GraftError) as caught:
        models[key].merge()
    assert caught.value.code == "GC051"
    assert how is wrong_store or "algebra" in str(caught.value.details[0])


@pytest.mark.slow
@every_twins
def test_a_flip_between_scores_far_apart_is_refused(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that move farther than rounding moves them are no near choice, whatever the outputs are."""
    certificate = twins.merge().certificate
    gap = max(route.gap for route in certificate.routes)
    monkeypatch.setattr(comparing, "score_noise", lambda scores, dtype: gap / 1000)
    monkeypatch.setattr(certifying, "rounding_noise", lambda *given: 0.0)
    with pytest.raises(GraftError) as caught:
        twins.merge()
    assert caught.value.code == "GC051" and "chose differently" in str(caught.value)
    merged = twins.merge(budget=10.0)
    assert merged.certificate.passed and any(route.flips for route in merged.certificate.routes)


@pytest.mark.slow
@every_twins
def test_what_stays_is_compared_with_the_same_routes(twins: Any) -> None:
    """An adaptation that does not fold is compiled on a folded base."""
    base = twins.compilation.source
    two = {"adapt": [*spec(ROLES[:3])["adapt"], {"method": "prefix", "length": 3}]}
    compiled = graftc.compile(two, base).eval()
    perturb(compiled)
    certificate = compiled.merge_partially().certificate
    assert certificate.passed and len(certificate.routes) == 2
    assert any(route.flips for route in certificate.routes)


def choice(scores: list[list[float]], k: int) -> RouteChoice:
    """Return the choice of the largest ``k`` of each row."""
    values = torch.tensor(scores)
    return RouteChoice(values, values.topk(k).indices)


CASES: dict[str, tuple[list[list[float]], list[list[float]], int, tuple[int, float]]] = {
    "the same": ([[3, 2, 1]], [[3, 2, 1]], 2, (0, 0)),
    "another order of the same": ([[3, 2.9, 1]], [[2.9, 3, 1]], 2, (0, 0)),
    "one other, the gap on either side": ([[3, 2, 1.9]], [[3, 2, 2.5]], 2, (1, 0.5)),
    "one other, the gap before": ([[3, 2, 1]], [[3, 2, 2.1]], 2, (1, 1)),
    "a row of two": ([[3, 2, 1], [3, 2, 1]], [[3, 2, 1], [1, 2, 3]], 1, (1, 2)),
    "all others": ([[4, 3, 2, 1]], [[1, 2, 3, 4]], 2, (1, 3)),
    "a full order": ([[3, 2.9, 1]], [[2.9, 3, 1]], 3, (1, 0.1)),
}


@pytest.mark.parametrize("case", CASES)
def test_flips_and_their_gaps(case: str) -> None:
    before, after, k, (flips, gap) = CASES[case]
    result = Flips.between(choice(before, k), choice(after, k))
    assert (result.choices, result.flips) == (len(before), flips) and result.gap == pytest.approx(gap)


def test_choices_of_another_number_are_all_others() -> None:
    flips = Flips.between(choice([[1, 2, 3]], 2), choice([[1, 2, 3], [1, 2, 3]], 2))
    assert flips.flips == 1 and flips.gap == float("inf")
    evidence = RouteEvidence("topk", "gate", flips.choices, flips.flips, flips.gap, 1.0, 4.0)
    assert not evidence.passed and json.dumps(evidence.to_json(), allow_nan=False)
    other = {"topk": choice([[1, 4]], 1), "other": choice([[1]], 1)}
    assert moved({"topk": choice([[1, 2]], 1)}, other) == {"topk": 2.0}


def test_noise_is_of_the_coarser_type() -> None:
    scores = torch.tensor([0.5, -2.0])
    assert score_noise(scores, torch.float32) == 2 * torch.finfo(torch.float32).eps
    assert score_noise(scores, torch.bfloat16) == score_noise(scores.bfloat16(), torch.float32) == 2**-6


class Chooses(nn.Module):
    """A model that chooses among its scores by a given function."""

    def __init__(self, take: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scores = nn.Linear(6, 6)
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.scores(x))


TAKE: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "topk": (1, lambda s: s.topk(2, -1).indices.float() + s.topk(2, -1).values.sum()),
    "the least, first axis": (1, lambda s: s.topk(1, 0, largest=False).indices.float() * s),
    "argmax": (1, lambda s: s.argmax(-1, keepdim=True) * s),
    "argmax without the axis": (1, lambda s: s.argmax(-1).unsqueeze(-1) * s),
    "argmin of all": (1, lambda s: s.argmin() * s),
    "max": (1, lambda s: s.max(0).indices * s.max(0).values + s),
    "max, kept": (1, lambda s: s.max(-1, keepdim=True)[1] * s),
    "sort": (1, lambda s: s.sort(-1, descending=True)[1] * s),
    "argsort": (1, lambda s: s.argsort(0) * s),
    "values alone": (0, lambda s: s.topk(2, -1).values + s.max(-1, keepdim=True)[0]),
    "whole numbers": (0, lambda s: (s > 0).int().sort(-1)[1] * s),
}


@pytest.mark.parametrize("case", TAKE)
def test_ways_to_choose(case: str) -> None:
    """Every operator that chooses is detected, gives its own choice by default, and takes one that is imposed."""
    count, take = TAKE[case]
    torch.manual_seed(0)
    compiled = adapted(Chooses(take), lora(modules="scores"), inputs={"x": torch.rand(5, 6)}, noise=0.5)
    x = torch.randn(5, 6)
    evaluation = Evaluation(compiled._graftc, {"x": x})
    assert len(choices_of(compiled.compilation.program("eval", "base"))) >= count
    routes = Routes()
    with torch.no_grad():
        (opened,) = evaluation.outputs(routes)
        assert torch.equal(opened, compiled(x)) and len(routes.seen) == count
        other = {
            name: RouteChoice(own.scores, own.chosen.flip(-1) if own.chosen.shape[-1] > 1 else (own.chosen + 1) % 5)
            for name, own in routes.seen.items()
        }
        imposed = Routes(other)
        (output,) = evaluation.outputs(imposed)
    assert torch.equal(output, opened) is (count == 0)
    assert all(torch.equal(imposed.seen[name].chosen, own.chosen) for name, own in routes.seen.items())


def test_the_operator_gives_its_own_choice_where_nothing_is_imposed() -> None:
    scores = torch.randn(3, 4)
    numbers = scores.topk(2, 1).indices
    values, taken = route(scores, numbers, 1, "topk")
    assert torch.equal(taken, numbers) and torch.equal(values, scores.topk(2, 1).values)
    torch.library.opcheck(torch.ops.graftc.route.default, (scores, numbers, 1, "topk"), test_utils="test_schema")


@pytest.mark.slow
def test_opening_a_graph_leaves_it() -> None:
    compiled = with_routes("mixtral")
    program = compiled.compilation.program("eval")
    before = str(program.graph)
    opened = route_choices(program)
    assert str(program.graph) == before and opened.entry == "routes"
    assert sum(node.target is torch.ops.graftc.route.default for node in opened.graph.nodes) == 2
