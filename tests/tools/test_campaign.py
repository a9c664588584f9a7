"""The campaign of random models, specs and routes: what it draws, finds, reduces and resumes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.passes.core.weights.folds import WeightFold
from graftc.passes.methods.ia3 import IA3Method
from graftc.specs.io import load_spec
from graftc.specs.methods.lora import LoRA
from tests.tools import campaign_work
from tools.campaign import running
from tools.campaign.case import Case, check, draw_case, findings
from tools.campaign.comparing import apart
from tools.campaign.eager import Eager, leaves
from tools.campaign.grammar import FAMILIES, INPUTS, KINDS, Block, Layer, Model, draw_model
from tools.campaign.minimising import failures_of, minimised, script
from tools.campaign.models import build, inputs_of
from tools.campaign.routes import ROUTES
from tools.campaign.specs import draw_spec

MLP = Block("mlp", {"inner": 10, "activation": "tanh", "bias": True})
ATTENTION = Block("attention", {
    "form": "contiguous", "heads": 2, "groups": 1, "causal": True, "by_hand": False, "bias": True
})  # fmt: skip
SMALL = Model(seed=1, layers=(Layer((ATTENTION, MLP), copies=2), Layer((MLP,))), masked=True, pooled=True)


# --- what is drawn --------------------------------------------------------------------------------------


def test_seeds_draw_every_kind_of_block_and_model() -> None:
    models = [draw_model(seed) for seed in range(200)]
    blocks = [block for model in models for layer in model.layers for block in layer.blocks]
    assert {block.kind for block in blocks} == set(KINDS)
    assert {model.family for model in models} == {None, *FAMILIES}
    assert {model.input for model in models} == set(INPUTS)
    assert any(layer.tied for model in models for layer in model.layers)
    assert any(model.outputs == 0 for model in models) and any(model.pooled for model in models)


@pytest.mark.slow
def test_a_seed_is_one_case() -> None:
    for seed in (1, 10):
        case = draw_case(seed)
        assert case == draw_case(seed) != replace(draw_case(seed + 1), seed=seed)
        assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
        assert set(case.routes) <= set(ROUTES) and len(set(case.routes)) == 2


@pytest.mark.slow
def test_what_is_drawn_runs_and_parses() -> None:
    for seed in range(30):
        model = draw_model(seed)
        built = build(model)
        load_spec(draw_spec(seed, model, built))
        if model.family is not None:
            continue
        for sizes in ((2, 5), (1, 3)):
            inputs = inputs_of(model, built, sizes)
            outputs = leaves(built(**inputs))
            assert all(torch.isfinite(output).all() for output in outputs), seed
            assert apart(outputs, leaves(build(model)(**inputs))) == 0, seed


def test_nan_never_equals() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert apart([nan], [nan]) == float("inf")
    assert apart([torch.ones(2)], [torch.ones(3)]) == float("inf")
    assert apart([], []) == float("inf")
    assert apart([torch.tensor([2.0, 4.0])], [torch.tensor([2.0, 5.0])]) == pytest.approx(0.2)


def test_the_reference_leaves_the_eager_model_as_it_is() -> None:
    built = build(SMALL)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    module = "layers.2.parts.mlp.up"
    spec = {"adapt": [{"name": "a", "method": "lora", "rank": 1, "alpha": 3, "target": {"modules": [module]}}]}
    a, b = torch.randn(1, 8, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
    tensors = {f"{module}.graftc.a.A": a, f"{module}.graftc.a.B": b}
    inputs = inputs_of(SMALL, built, (2, 5))
    changed = leaves(Eager(built, spec).call(tensors, inputs))
    assert apart(changed, leaves(built(**inputs))) > 1e-3
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.state_dict().items())
    built.get_submodule(module).weight += 3 * b @ a  # type: ignore[operator]
    assert apart(changed, leaves(built(**inputs))) < 1e-14


# --- what is found --------------------------------------------------------------------------------------


def case_of(*entries: dict[str, Any], routes: tuple[str, ...]) -> Case:
    adapt = [{"name": f"a{number}", **entry} for number, entry in enumerate(entries)]
    return Case(seed=5, model=SMALL, spec={"adapt": adapt, "train": ["norm"]}, routes=routes, noise=0.2)


SCALED = {
    "method": "ia3",
    "side": "output",
    "target": {"modules": ["layers.0.parts.mlp.up", "layers.2.parts.mlp.up"]},
}
LOW_RANK = {"method": "lora", "rank": 2, "alpha": 8, "target": {"modules": ["layers.1.parts.attention.o"]}}


@pytest.mark.slow
def test_a_wrong_fold_is_found_and_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(SCALED, LOW_RANK, routes=("merge", "views"))

    def fold(self: Any, spec: Any, site: Any, tensors: Mapping[str, Tensor]) -> WeightFold:
        return WeightFold(lambda weight, bias: (weight / tensors["l"][:, None], bias))

    monkeypatch.setattr(IA3Method, "fold", fold)
    (failure,) = failures_of(check(case))
    assert failure == ("merge", "refused", "GC051")
    plain = Block("mlp", {"inner": 4, "activation": "relu", "bias": True})
    layers = (Layer((ATTENTION, plain), norm="none"), Layer((), copies=1, norm="none"), Layer((plain,), norm="none"))
    model = replace(SMALL, layers=layers, outputs=3, pooled=False)
    smallest = minimised(replace(case, model=model), failure, seconds=60)
    (entry,) = smallest.spec["adapt"]
    assert entry["method"] == "ia3" and len(entry["target"]["modules"]) == 1
    assert [block.kind for layer in smallest.model.layers for block in layer.blocks] == ["mlp"]
    assert "train" not in smallest.spec
    assert smallest.routes == ("merge",) and not smallest.model.masked
    compile(script(smallest), "script", "exec")


@pytest.mark.slow
def test_a_wrong_scale_that_folds_as_it_trains_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoRA, "scaling", property(lambda spec: spec.alpha / (spec.rank + 1)))
    record = check(case_of(LOW_RANK, routes=("merge",)))
    assert {name for name, *_ in failures_of(record)} == {"outputs", "gradients", "merge"}
    assert all(each["status"] == "difference" for each in findings(record).values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 14, 19, 22])
def test_a_sample_of_the_campaign(seed: int) -> None:
    record = check(draw_case(seed))
    assert not findings(record), record


# --- running --------------------------------------------------------------------------------------------


def run(path: Path, seeds: range, work: Any = campaign_work.equal, **options: Any) -> tuple[dict[int, Any], list[str]]:
    told: list[str] = []
    preload = ["tests.tools.campaign_work"]
    return running.run(seeds, path, work=work, preload=preload, tell=told.append, **options), told


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    run(path, range(2))
    with path.open("a") as file:
        file.write('{"seed": 2, "che')
    records, told = run(path, range(4))
    assert sorted(records) == [0, 1, 2, 3] and told[0] == "2 of 4 seeds are done" and len(told) == 3
    assert running.counts_of(records.values())["seeds"] == {"equal": 4}
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line.replace('"state"', '"other"') for line in lines))
    assert len(run(path, range(1))[1]) == 1, "results of other sources do not count"
    assert run(path, range(4), any_state=True)[1] == ["4 of 4 seeds are done"]


@pytest.mark.slow
def test_the_campaigns_own_process_runs_a_seed(tmp_path: Path) -> None:
    """It imports all modules of graftc beforehand, of which none may need packages that are not installed."""
    records = running.run([22], tmp_path / "results.jsonl", tell=lambda text: None)
    assert running.outcome_of(records[22]) == "equal", records


@pytest.mark.slow
def test_processes_that_die_or_hang_are_findings(tmp_path: Path) -> None:
    limits = running.Limits(seconds=4, minimising=1)
    records, _ = run(tmp_path / "results.jsonl", range(4), campaign_work.uneven, limits=limits, jobs=4)
    outcomes = {seed: running.outcome_of(record) for seed, record in records.items()}
    assert outcomes == {0: "died", 1: "timeout", 2: "difference", 3: "refused"}
    assert [bool(records[seed].get("findings")) for seed in range(4)] == [True, True, True, False]
    assert "at merge" in records[1]["findings"]["time"]["message"]
