"""Recipes: all trainings in one call, which is resumed after it was killed."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.applications.recipes.tune import Stage
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import same_tensors
from tests.kit.forks import Worker
from tests.kit.training import adamw
from tests.runtime.training.test_selecting import batches, entries

SPEC: dict[str, Any] = {
    "adapt": [{"method": "lt_sft", "iterations": 2, "entries": 700}],
    "train": ["classifier"],
}

KILLS = int(os.environ.get("GRAFTC_KILLS", "10")) // 5
"""Kills of one run; ``make gates`` has ten."""


def train(compiled: Compiled, stage: Stage) -> None:
    """Do some steps of AdamW with weight decay, with random numbers of torch and Python."""
    optimiser = adamw(compiled, lr=1e-2, weight_decay=0.5)
    for batch in batches(compiled.compilation.model, 3):
        optimiser.zero_grad()
        (compiled(**batch).loss * (1 + torch.rand(()) + random.random())).backward()
        optimiser.step()
        compiled.after_step()


def base_of(compiled: Compiled) -> dict[str, Tensor]:
    """Return the base's own parameters."""
    return {n: p.detach() for n, p in compiled.compilation.source.named_parameters()}


@pytest.mark.full
def test_lottery_ticket() -> None:
    """The entries that change most in a dense training are chosen, and all others are the base's in the end."""
    model = tiny("bert")
    seen: list[tuple[int, int]] = []
    before: list[dict[str, Tensor]] = []
    after: list[dict[str, Tensor]] = []

    def watched(compiled: Compiled, stage: Stage) -> None:
        seen.append((stage.number, stage.total))
        before.append({n: t.clone() for n, t in compiled.adapter_state_dict().items()})
        train(compiled, stage)
        after.append({n: t.clone() for n, t in compiled.adapter_state_dict().items()})

    tuned = graftc.tune({"adapt": [{"method": "lt_sft", "entries": 700}], "train": ["classifier"]}, model, watched)
    assert seen == [(1, 2), (2, 2)]
    head = "classifier.graftc.trained.weight"
    assert torch.equal(before[1][head], before[0][head]) and not torch.equal(after[0][head], before[0][head])
    deltas = [t for n, t in before[1].items() if n.endswith("_delta")]
    assert sum(t.numel() for t in deltas) == 700 and not any(t.any() for t in deltas)
    base, chosen = base_of(tuned), entries(tuned)
    moved = {}
    for name, tensor in base.items():
        module, _, last = name.rpartition(".")
        copy = after[0].get(f"{module}.graftc.lt_sft.{last}")
        if copy is not None and not name.startswith("classifier"):
            moved[name] = (copy - tensor).abs().flatten()
    least = torch.cat(list(moved.values())).topk(700).values.min()
    for name, own in moved.items():
        assert {i for i in torch.nonzero(own > least).flatten().tolist()} <= chosen.get(name, set())
        assert all(own[i] >= least for i in chosen.get(name, ()))
    folded = dict(tuned.merge().to_transformers().named_parameters())
    for name, tensor in base.items():
        changed = set(torch.nonzero((folded[name] != tensor).flatten()).flatten().tolist())
        if not name.startswith("classifier"):
            assert changed <= chosen.get(name, set()), name
    kept = sum(len(own) for own in chosen.values())
    assert kept == 700


@pytest.mark.full
def test_iterations_add_their_shares() -> None:
    """Each iteration starts from the result of the one before, and keeps its entries."""
    model = tiny("gpt2")
    starts: list[tuple[dict[str, set[int]], dict[str, Tensor]]] = []

    def watched(compiled: Compiled, stage: Stage) -> None:
        state = {n: t.clone() for n, t in compiled.adapter_state_dict().items()}
        starts.append((entries(compiled), state))
        train(compiled, stage)
        ends.append({n: t.clone() for n, t in compiled.adapter_state_dict().items()})

    ends: list[dict[str, Tensor]] = []
    tuned = graftc.tune({"adapt": [{"method": "lt_sft", "iterations": 3, "entries": 100}]}, model, watched)
    counts = [sum(len(own) for own in chosen.values()) for chosen, _ in starts]
    assert counts == [0, 33, 33, 66, 66, 100]
    for earlier, later in ((1, 3), (3, 5)):
        for name, own in starts[earlier][0].items():
            assert own <= starts[later][0][name]
    # A dense training starts from the result of the sparse one before, and so does the next sparse one.
    inputs = inputs_for(tuned)
    assert tuned.report.trainable_parameters == 100
    for sparse in (1, 3):
        for name, delta in ends[sparse].items():
            if name.endswith("_delta"):
                indices = ends[sparse][name.replace("_delta", "_indices")].tolist()
                following = dict(
                    zip(
                        starts[sparse + 2][1][name.replace("_delta", "_indices")].tolist(),
                        starts[sparse + 2][1][name].tolist(),
                        strict=True,
                    )
                )
                assert [following[i] for i in indices] == delta.tolist()
                assert sum(value != 0 for value in following.values()) <= len(indices)
    assert not same_bits(outputs_of(tuned, inputs), outputs_of(model, inputs))


@pytest.mark.full
def test_rows_of_a_fused_weight() -> None:
    """Rows of GPT-2's queries and values are columns of the stored weight."""
    model = tiny("gpt2")
    spec = {"adapt": [{"method": "lt_sft", "iterations": 2, "entries": 90, "target": {"role": ["attn.q", "attn.v"]}}]}
    tuned = graftc.tune(spec, model, train)
    folded = dict(tuned.merge().to_transformers().named_parameters())
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_attn.weight"
        moved = folded[name] != base_of(tuned)[name]
        assert bool(moved[:, :48].any()) and not bool(moved[:, 48:96].any()) and bool(moved[:, 96:].any())
    assert sum(int((folded[n] != t).sum()) for n, t in base_of(tuned).items()) <= 90


@pytest.mark.full
def test_a_run_in_a_folder_is_the_same(tmp_path: Path) -> None:
    """Runs with and without a folder give the same, and a finished one gives its result without training."""
    model = tiny("bert")
    plain = graftc.tune(SPEC, model, train)
    torch.manual_seed(0)  # a run seeds torch for its trainings, and the next one starts from torch's seed
    kept = graftc.tune(SPEC, model, train, folder=tmp_path / "recipe")

    def refuse(compiled: Compiled, stage: Stage) -> None:
        raise AssertionError("it is done")

    again = graftc.tune(SPEC, model, refuse, folder=tmp_path / "recipe")
    for other in (kept, again):
        state = other.adapter_state_dict()
        assert all(torch.equal(t, state[n]) for n, t in plain.adapter_state_dict().items())
    with pytest.raises(GraftError, match="a different seed") as error:
        graftc.tune(SPEC, model, train, folder=tmp_path / "recipe", seed=1)
    assert error.value.code == "GC058"
    with pytest.raises(GraftError, match="a different base") as error:
        graftc.tune(SPEC, tiny("bert", seed=1), train, folder=tmp_path / "recipe")
    assert error.value.code == "GC058"


@pytest.mark.parametrize(
    ("name", "text", "folder", "code"),
    [
        ("notes.txt", "mine", "recipe", "GC058"),
        ("recipe.json", "{", "recipe", "GC058"),
        ("recipe.json", "[]", "recipe", "GC058"),
        ("file", "mine", "recipe/file", "GC064"),
        ("file", "mine", "recipe/file/deep", "GC064"),
    ],
)
def test_a_place_that_holds_something_else(tmp_path: Path, name: str, text: str, folder: str, code: str) -> None:
    path = tmp_path / "recipe" / name
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GraftError) as error:
        graftc.tune(SPEC, tiny("bert"), train, folder=tmp_path / folder)
    assert error.value.code == code and str(tmp_path) in error.value.message
    assert [each.name for each in path.parent.iterdir()] == [name] and path.read_text(encoding="utf-8") == text


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_recipe(tmp_path: Path) -> None:
    """Reading it would never end."""
    os.mkfifo(tmp_path / "recipe.json")
    with pytest.raises(GraftError, match="does not identify a recipe"):
        graftc.tune(SPEC, tiny("bert"), train, folder=tmp_path)


@pytest.mark.full
def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A second run in the folder of an unfinished one is refused, and the first one continues."""
    model, seen = tiny("bert"), []

    def again(compiled: Compiled, stage: Stage) -> None:
        with pytest.raises(GraftError, match="another run is using") as error:
            graftc.tune(SPEC, model, train, folder=tmp_path)
        seen.append(error.value.code)
        train(compiled, stage)

    tuned = graftc.tune(SPEC, model, again, folder=tmp_path, seed=0)
    assert seen == ["GC063"] * 4
    alone = graftc.tune(SPEC, model, train, seed=0)
    assert same_bits(list(tuned.adapter_state_dict().values()), list(alone.adapter_state_dict().values()))


@pytest.mark.parametrize("change", [{"folder": 5}, {"folder": ""}, {"train": "train"}])
def test_arguments_of_another_kind(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(GraftError) as error:
        graftc.tune(SPEC, tiny("bert"), **{"train": train, "folder": tmp_path, **change})
    assert error.value.code == "GC073"


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """A selection and two trainings, killed at random moments, end like a run that was not killed."""
    model = tiny("bert")
    worker = Worker("tests.applications.recipes.recipe_worker", tmp_path)
    try:
        assert worker.run("whole")[0] == 0
        shutil.rmtree(tmp_path / "whole")
        status, seconds = worker.run("whole")  # the first one has captured the model
        assert status == 0
        draw, kills, at = random.Random(0), 0, set()
        while kills < KILLS or len(at) == 1:  # kills should fall into different stages
            assert kills < 6 * KILLS
            status, _ = worker.run("killed", draw.uniform(0, 1.1 * seconds))
            kills += status == -9
            at.add(len(list((tmp_path / "killed").glob("stage-*"))))
            if status == 0:  # it finished before the kill: start over
                shutil.rmtree(tmp_path / "killed")
        assert worker.run("killed")[0] == 0
    finally:
        worker.process.kill()
        worker.process.wait()
    whole, resumed = (
        graftc.load(tmp_path / name / "result", model).adapter_state_dict() for name in ("whole", "killed")
    )
    assert same_tensors(whole, resumed)


@pytest.mark.full
def test_task_and_language() -> None:
    """Two fine-tunes of one base add up, in either order, and fold; the head of the second is left out."""
    model = tiny("bert")
    models = [
        graftc.compile(
            {"adapt": [{"method": "lt_sft", "stage": 2, "name": name, "density": 0.2}], "train": ["classifier"]},
            model,
            seed=seed,
        ).eval()
        for seed, name in enumerate(("task", "language"))
    ]
    for compiled in models:
        perturb(compiled, 0.05)
    both, other = models[0].joined(models[1]), models[1].joined(models[0])
    folded = [dict(m.eval().merge().to_transformers().named_parameters()) for m in (both, other, *models)]
    base = dict(model.named_parameters())
    for name, tensor in base.items():
        if not name.startswith("classifier"):
            wanted = folded[2][name].double() + folded[3][name].double() - tensor.double()
            assert torch.allclose(folded[0][name].double(), wanted, rtol=0, atol=1e-6)
            assert torch.equal(folded[0][name], folded[1][name])
    assert torch.equal(folded[0]["classifier.weight"], folded[2]["classifier.weight"])
    with pytest.raises(GraftError) as error:
        models[0].joined(models[0])
    assert error.value.code == "GC005"
    with pytest.raises(GraftError) as error:
        models[0].joined(graftc.compile({"adapt": [{"method": "ia3"}]}, tiny("bert", seed=1)))
    assert error.value.code == "GC087"
