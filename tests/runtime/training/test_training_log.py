"""Training logs: their records of losses, ranks, turnover, gates and routes, and reading them back."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.passes.core.method.steering import Controller
from graftc.runtime.training.curves import MOST_RESUMES
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import fresh, still
from tests.kit.training import adamw, train
from tests.passes.methods import spiel_models

TARGET = {"role": ["attn.q", "ffn.down"]}
ADALORA = {"method": "adalora", "target": TARGET, "rank": 4, "target_rank": 2, "warmup_steps": 1, "final_steps": 2}
SORA = {"method": "sora", "target": TARGET, "rank": 4, "threshold": 0.3, "l1": 0.1}
DYLORA = {"method": "dylora", "target": TARGET, "rank": 4}
PRUNING = {"method": "pruning", "target": TARGET, "variant": "magnitude", "density": 0.5}
UNIPELT: dict[str, Any] = {"method": "unipelt", "prefix": {"length": 3}, "adapter": {"reduction": 6}}
TOTAL = 8


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def watched(compiled: Any) -> bool:
    """Return whether forward passes are observed."""
    return compiled._graftc.progress.observer is not None


def silent_read(path: Path, **options: Any) -> list[Any]:
    """Read the curves of a log, which must not cause a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        return graftc.read_log(path, **options)


@pytest.mark.full
def test_ranks_of_sites_are_those_of_the_model_at_every_logged_step(tmp_path: Path) -> None:
    """Ranks fall from all of them to the target, and the last line is `rank_pattern` at the end."""
    compiled = fresh("bert", ADALORA)
    compiled.begin(TOTAL)
    log = graftc.TrainingLog(compiled, tmp_path / "log.jsonl", every=2)
    losses = train(compiled, adamw(compiled, lr=5e-3), range(TOTAL), log=log)
    lines = lines_of(log.path)
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8]
    assert [line["loss"] for line in lines] == pytest.approx([losses[n - 1] for n in (1, 2, 4, 6, 8)], rel=1e-6)
    curves = {(c["group"], c["name"]): c for c in silent_read(log.path)}
    ranks = [curve for (group, _), curve in curves.items() if group == "adalora: rank"]
    pattern = compiled.rank_pattern("adalora")
    assert {c["name"]: c["values"][-1] for c in ranks} == {site: int(live.sum()) for site, live in pattern.items()}
    assert sum(c["values"][0] for c in ranks) == 4 * len(ranks)
    assert sum(c["values"][-1] for c in ranks) == 2 * len(ranks)
    assert all(c["steps"][-1] == TOTAL and c["steps"] == sorted(c["steps"]) for c in ranks)
    assert curves["training", "loss"]["steps"] == [1, 2, 4, 6, 8]


@pytest.mark.full
@pytest.mark.parametrize("entry", [SORA, DYLORA, PRUNING], ids=lambda entry: str(entry["method"]))
def test_figures_are_those_of_the_tensors(entry: Any, tmp_path: Path) -> None:
    compiled = fresh("bert", entry)
    compiled.begin(TOTAL)
    train(compiled, adamw(compiled, lr=5e-3), range(3), log=graftc.TrainingLog(compiled, tmp_path / "log.jsonl"))
    (sites,) = compiled.site_figures().values()
    assert len(sites) == 4
    if entry is PRUNING:
        tensors = dict(compiled.named_parameters())
        assert all(0.5 <= own["density"] < 1 for own in sites.values()) and tensors
        return
    pattern = compiled.rank_pattern(entry["method"])
    assert {site: own["rank"] for site, own in sites.items()} == {s: float(p.sum()) for s, p in pattern.items()}
    if entry is SORA:
        assert any(own["rank"] < 4 for own in sites.values())


@pytest.mark.full
def test_turnover_is_the_share_of_entries_that_have_been_replaced(tmp_path: Path) -> None:
    compiled = fresh("llama", spiel_models.spiel())
    log = graftc.TrainingLog(compiled, tmp_path / "log.jsonl", every=1)
    optimiser, by_name = spiel_models.optimiser_for(compiled), spiel_models.entries_of(compiled)
    moved = {}
    for number in range(1, 7):
        before = {name: entries.tensor("indices").clone() for name, entries in by_name.items()}
        spiel_models.train(compiled, optimiser, [number])
        log.step()
        for name, entries in by_name.items():
            share = float((~torch.isin(entries.tensor("indices"), before[name])).float().mean())
            if number in (2, 6):
                moved[str(entries.place.site.key), number] = share
    lines = lines_of(log.path)
    assert lines[0]["figures"] == {} and lines[2]["figures"] == {}
    curves = [c for c in silent_read(log.path) if c["group"] == "spiel: turnover"]
    assert len(curves) == len(by_name)
    for curve in curves:
        assert curve["steps"][0] == 2 and curve["values"][0] == pytest.approx(moved[curve["name"], 2])
        assert curve["steps"][-1] == 6 and curve["values"][-1] == pytest.approx(moved[curve["name"], 6])
    assert any(moved.values())


@pytest.mark.full
def test_gates_are_their_mean_values_in_the_pass(tmp_path: Path) -> None:
    """A gate with a bias far from zero is open or closed, whatever its input; observing it changes no output."""
    compiled = fresh("bert", UNIPELT)
    biases = {n: p for n, p in compiled.named_parameters() if n.endswith("gate_bias")}
    with torch.no_grad():
        for number, bias in enumerate(biases.values()):
            bias.fill_(30.0 if number % 2 else -30.0)
    compiled.train()
    inputs = {**inputs_for(compiled, seed=0), "labels": torch.arange(5) % 3}
    torch.manual_seed(0)
    plain = compiled(**inputs).loss
    log = graftc.TrainingLog(compiled, tmp_path / "log.jsonl")
    torch.manual_seed(0)
    watched = compiled(**inputs).loss
    assert torch.equal(plain, watched)
    log.step(loss=watched)
    (line,) = lines_of(log.path)
    values = [figures["gate"] for figures in line["figures"]["unipelt"].values()]
    assert len(values) == len(biases) and {round(v) for v in values} == {0, 1}
    assert all(v < 1e-6 or v > 1 - 1e-6 for v in values)


@pytest.mark.full
def test_compiled_layers_are_not_looked_into(tmp_path: Path) -> None:
    """A log must not cause recompilation: code is guarded by what observes it."""
    compiled = fresh("bert", UNIPELT)
    calls: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        calls.append(module)
        return module.forward

    compiled.compile_layers(backend=backend)
    train(
        compiled,
        adamw(compiled, lr=5e-3),
        range(2),
        log=(log := graftc.TrainingLog(compiled, tmp_path / "log.jsonl", every=100)),
    )
    before = len(calls)
    train(
        compiled,
        adamw(compiled, lr=5e-3),
        range(2),
        log=graftc.TrainingLog(compiled, tmp_path / "other.jsonl", every=1),
    )
    assert before and len(calls) == before
    assert all(line["figures"] == {} for line in lines_of(log.path))


@pytest.mark.full
def test_gates_of_a_composition(tmp_path: Path) -> None:
    parts = [{"method": "lora", "name": name, "target": TARGET, "rank": 2} for name in ("one", "two")]
    compiled = graftc.compile({"adapt": parts, "compose": [{"gate": ["one", "two"]}]}, tiny("bert"))
    log = graftc.TrainingLog(compiled, tmp_path / "log.jsonl")
    train(compiled, adamw(compiled, lr=5e-3), range(1), log=log)
    (line,) = lines_of(log.path)
    assert {name: len(sites) for name, sites in line["figures"].items()} == {"one": 4, "two": 4}
    assert all(0 < f["gate"] < 1 for sites in line["figures"].values() for f in sites.values())


@pytest.mark.full
def test_routes_are_numbers_of_experts(tmp_path: Path) -> None:
    compiled = fresh("bert", {"method": "adamix_lora", "target": TARGET, "rank": 2, "experts": 3, "share": "none"})
    log = graftc.TrainingLog(compiled, tmp_path / "log.jsonl", every=1)
    train(compiled, adamw(compiled, lr=5e-3), range(12), log=log)
    curves = [c for c in silent_read(log.path) if c["group"].startswith("adamix_lora: ")]
    assert {c["group"] for c in curves} == {"adamix_lora: A_route", "adamix_lora: B_route"} and len(curves) == 8
    assert {v for c in curves for v in c["values"]} == {0, 1, 2}


@pytest.mark.slow
def test_steps_between_lines_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is computed, no value is read, and forward passes are not observed."""
    compiled = fresh("bert", ADALORA)
    compiled.begin(TOTAL)
    log = graftc.TrainingLog(compiled, tmp_path / "log.jsonl", every=4)
    train(compiled, adamw(compiled, lr=5e-3), range(1), log=log)
    monkeypatch.setattr(Controller, "figures", None)
    assert not watched(compiled)
    assert not log.step(loss=object()) and not log.step(loss=object())
    assert watched(compiled), "the pass before the next line is looked at"
    with pytest.raises(TypeError):
        log.step()


@pytest.mark.slow
def test_a_log_is_continued_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    compiled, path = fresh("bert", SORA), tmp_path / "deep" / "log.jsonl"
    train(compiled, adamw(compiled, lr=5e-3), range(4), log=graftc.TrainingLog(compiled, path, every=2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-15])
    assert next(c["steps"][-1] for c in silent_read(path)) == 2
    log = graftc.TrainingLog(compiled, path, every=2)
    train(compiled, adamw(compiled, lr=5e-3), range(2), log=log)
    with pytest.warns(GraftWarning, match="GC124"):
        curves = graftc.read_log(path)
    assert curves[0]["name"] == "loss" and curves[0]["steps"] == [1, 2, 3, 4]


def test_steps_that_are_taken_again_replace_those_of_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": s, "loss": s, "figures": {"a": {"x": {"rank": 10 - s}}}} for s in (1, 2, 3, 4, 5)]
    lines += [{"step": s, "loss": 100 + s, "figures": {"a": {"x": {"rank": 7}}} if s == 3 else {}} for s in (3, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    loss, rank = silent_read(path)
    assert (loss["steps"], loss["values"]) == ([1, 2, 3, 4], [1, 2, 103, 104])
    assert (rank["steps"][-1], rank["values"]) == (4, [9, 8, 7, 7])


def test_a_value_holds_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    changes = {1: 8, 50: 4, 51: 3}
    lines = [{"step": s, "figures": {"a": {"x": {"rank": changes[s]}}} if s in changes else {}} for s in range(1, 101)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (curve,) = silent_read(path)
    assert list(zip(curve["steps"], curve["values"], strict=True)) == [(1, 8), (49, 8), (50, 4), (51, 3), (100, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("count", [999, 1000, 1001, 20_000])
def test_long_logs_are_thinned(count: int, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(f'{{"step":{s},"loss":{s}.5}}\n' for s in range(1, count + 1)), encoding="utf-8")
    for most in (1000, 7, 2):
        (curve,) = silent_read(path, points=most)
        assert most / 3 <= len(curve["steps"]) <= most or count < most
        assert curve["steps"][0] == 1 and curve["steps"][-1] == count
        assert curve["values"] == [step + 0.5 for step in curve["steps"]]
        gaps = [b - a for a, b in zip(curve["steps"], curve["steps"][1:], strict=False)]
        assert len(set(gaps[:-1])) <= 1, "evenly"


HOSTILE = (
    "", "null", "[]", "{}", '{"step": -1}', '{"step": true}', '{"step": 1.5}', '{"step": 9e99}', '{"step": "4"}',
    "{" * 9999,
    '{"step": 3, "figures": []}', '{"step": 3, "figures": {"a": 1}}', '{"step": 3, "figures": {"a": {"x": 1}}}',
    '{"step": 3, "loss": NaN}', '{"step": 3, "step": 4}', '{"step": 3, "loss": "\\ud800"}', f'{{"step": {"9" * 5000}}}',
    '{"step": 3, "loss": 1e999}', "\x00\x1b[31m",
)  # fmt: skip


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_lines_that_say_nothing_are_left_out(line: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{{"step":1,"loss":1.0}}\n{line}\n{{"step":2,"loss":2.0}}\n', encoding="utf-8")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (curve,) = graftc.read_log(path)
    assert curve["values"] == [1.0, 2.0]
    assert [w.message.code for w in caught] == (["GC124"] if line else [])  # type: ignore[union-attr]


def test_values_of_another_kind_and_names_are_data(tmp_path: Path) -> None:
    name = "<script>\u202e|`" + "x" * 10_000
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1, name: 1, "note": "text", "on": True, "none": None, "list": [1]}) + "\n")
    assert [(c["name"], c["values"]) for c in silent_read(path)] == [(name, [1.0])]


def test_a_log_that_goes_back_for_ever_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step":2,"loss":1}\n{"step":1,"loss":1}\n' * (MOST_RESUMES + 50), encoding="utf-8")
    with pytest.warns(GraftWarning, match="GC124"):
        (curve,) = graftc.read_log(path)
    assert len(curve["steps"]) <= 2


@pytest.mark.parametrize("content", [None, b"", b"text\n", b"{}", b'{"log_history": 3}', b"\xff" * 100])
def test_what_is_no_log_is_an_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraftError) as caught:
        graftc.read_log(path)
    assert caught.value.code == "GC123" and caught.value.exit_code == 3
    with pytest.raises(GraftError, match="GC123"):
        graftc.read_log(tmp_path)


@pytest.mark.slow
def test_arguments_and_places_are_checked(tmp_path: Path) -> None:
    compiled = fresh("bert", DYLORA)
    compiled.save(tmp_path / "artifact", certify=False)
    for inside in (tmp_path / "artifact" / "log.jsonl", tmp_path / "artifact" / "deep" / "log.jsonl"):
        with pytest.raises(GraftError, match="GC063"):
            graftc.TrainingLog(compiled, inside)
    graftc.load(tmp_path / "artifact", tiny("bert"))
    with pytest.raises(GraftError, match="GC064"):
        graftc.TrainingLog(compiled, tmp_path)
    for every in (0, True, 2.5, "3"):
        with pytest.raises(GraftError, match="GC073"):
            graftc.TrainingLog(compiled, tmp_path / "log.jsonl", every=every)  # type: ignore[arg-type]
    models: list[Any] = [tiny("bert"), compiled.merge(allow_unchanged=True)]
    for model in models:
        with pytest.raises(GraftError, match="GC073"):
            graftc.TrainingLog(model, tmp_path / "log.jsonl")
    log = graftc.TrainingLog(compiled, tmp_path / "log.jsonl", every=1)
    for values in ({"loss": "low"}, {"loss": torch.ones(2)}, {"figures": 1}, {"time": 1}):
        with pytest.raises(GraftError, match="GC073"):
            log.step(**values)
    log.step(loss=float("nan"), other=torch.tensor([2]), third=float("inf"))
    (line,) = lines_of(log.path)
    assert line["loss"] is None and line["third"] is None and line["other"] == 2
    assert [c["name"] for c in silent_read(log.path) if c["group"] == "training"] == ["other"]


@pytest.mark.full
def test_the_trainer_logs_and_its_own_state_is_read(tmp_path: Path) -> None:
    """Both files have the Trainer's values, only the log has ranks, and a log does not change the training."""
    from transformers import IntervalStrategy

    from tests.runtime.training.test_steering_trainer import trainer

    def run(folder: Path, logged: bool) -> Any:
        compiled = fresh(still("bert"), ADALORA, seed=0)
        work = trainer(folder, compiled, logging_steps=2)
        work.eval_dataset = work.train_dataset
        work.args.eval_strategy = IntervalStrategy.EPOCH
        if logged:
            work.add_callback(graftc.TrainingLog(compiled, folder / "training_log.jsonl", every=2).callback())
        work.train()
        work.save_state()
        return compiled

    compiled = run(tmp_path / "a", True)
    other = run(tmp_path / "b", False)
    assert all(torch.equal(t, other.adapter_state_dict()[n]) for n, t in compiled.adapter_state_dict().items())
    ours = {(c["group"], c["name"]): c for c in silent_read(tmp_path / "a" / "training_log.jsonl")}
    theirs = {(c["group"], c["name"]): c for c in silent_read(tmp_path / "a" / "trainer_state.json")}
    for key in (("training", "loss"), ("evaluation", "eval_loss")):
        assert ours[key]["steps"] == theirs[key]["steps"]
        assert ours[key]["values"] == pytest.approx(theirs[key]["values"], rel=1e-5)
    assert ours["training", "loss"]["steps"] == [2, 4, 6, 8]
    ranks = [c for (group, _), c in ours.items() if group == "adalora: rank"]
    assert sum(c["values"][-1] for c in ranks) == 2 * len(ranks) > 0
    assert not watched(compiled)
