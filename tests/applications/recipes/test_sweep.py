"""Sweeps: rates are compared by the first seed, others follow at the best rate, and folders resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.applications.recipes.sweep import Sweep, Trial
from graftc.applications.recipes.tune import Stage
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.comparing import same_tensors
from tests.kit.refusals import refused

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}
MODEL = tiny("bert")
RATES = (1e-3, 1e-2, 1e-1)


class Runs:
    """Functions for a sweep that note the trials that really run."""

    def __init__(self, best: float = 1e-2) -> None:
        self.best = best
        self.trained: list[float] = []
        self.tested = 0
        self.rate = 0.0

    def train(self, compiled: Compiled, stage: Stage) -> None:
        """Put the rate and a random number into the tensors."""
        assert stage.rate is not None
        self.trained.append(stage.rate)
        with torch.no_grad():
            for parameter in compiled.parameters():
                if parameter.requires_grad:
                    parameter.fill_(stage.rate * (1 + float(torch.rand(()))))

    def score(self, compiled: Compiled) -> float:
        """Return how near the values are to 1.5 times the best rate, in orders of magnitude."""
        return -abs(math.log10(value_of(compiled) / (1.5 * self.best)))

    def test(self, compiled: Compiled) -> float:
        """Return the value."""
        self.tested += 1
        return value_of(compiled)

    def sweep(self, folder: Path | None = None, **options: Any) -> Sweep:
        """Return the sweep of these functions."""
        options = {"rates": RATES, "seeds": (0, 1, 2), "test": self.test, **options}
        return graftc.sweep(SPEC, MODEL, self.train, self.score, folder=folder, **options)


def value_of(compiled: Compiled) -> float:
    return float(next(iter(compiled.adapter_state_dict().values())).flatten()[0])


def test_further_seeds_follow_at_the_best_rate() -> None:
    """Only models at the best rate are tested, and the result's is that of the first seed."""
    runs = Runs()
    swept = runs.sweep()
    assert runs.trained == [*RATES, 1e-2, 1e-2] and runs.tested == 3
    assert swept.rate == 1e-2 and [trial.seed for trial in swept.best] == [0, 1, 2]
    assert [math.isnan(trial.test) for trial in swept.trials] == [True, False, True, False, False]
    assert value_of(swept.model) == swept.best[0].test and not swept.model.training
    assert len({trial.test for trial in swept.best}) == 3, "seeds differ"
    assert not swept.is_at_the_end and "best rate 0.01: mean test" in str(swept)


def test_the_order_of_rates_does_not_matter() -> None:
    swept = [Runs(1e-1).sweep(rates=rates, seeds=[4]) for rates in (RATES, RATES[::-1])]
    assert swept[0].trials == swept[1].trials or str(swept[0]) == str(swept[1])
    assert swept[0].rate == 1e-1 and swept[0].is_at_the_end and "end of the sweep" in str(swept[0])


def test_what_is_in_the_folder_is_not_trained_again(tmp_path: Path) -> None:
    """More rates and seeds train only what is new; the tensors are those of a sweep at once."""
    first, again, more = Runs(), Runs(), Runs(3e-2)
    swept = first.sweep(tmp_path)
    repeated = again.sweep(tmp_path)
    assert (again.trained, again.tested) == ([], 0) and str(repeated) == str(swept)
    assert same_tensors(repeated.model.adapter_state_dict(), swept.model.adapter_state_dict())
    wider = more.sweep(tmp_path, rates=(*RATES, 3e-2), seeds=range(4))
    assert more.trained[0] == 3e-2 and len(more.trained) in (1, 4)
    assert {trial.rate for trial in wider.trials} == {*RATES, 3e-2}


@pytest.mark.slow
@pytest.mark.sample("4")
@pytest.mark.parametrize("stop", range(5))
def test_an_interrupted_sweep_resumes(stop: int, tmp_path: Path) -> None:
    """Wherever it stops, the next call trains what is missing and ends with the same scores."""

    class Stops(Runs):
        def train(self, compiled: Compiled, stage: Stage) -> None:
            if len(self.trained) == stop:
                raise KeyboardInterrupt
            super().train(compiled, stage)

    with pytest.raises(KeyboardInterrupt):
        Stops().sweep(tmp_path)
    rest = Runs()
    swept = rest.sweep(tmp_path)
    assert len(rest.trained) == 5 - stop
    assert str(swept) == str(Runs().sweep())


@pytest.mark.parametrize(("score", "rate"), [(lambda value: -math.inf, None), (lambda value: -value, 1e-3)])
def test_a_rate_that_diverges_is_not_chosen(score: Callable[[float], float], rate: float | None) -> None:
    runs = Runs()
    function = lambda compiled: score(value_of(compiled)) if value_of(compiled) < 0.1 else math.nan  # noqa: E731
    if rate is None:
        with pytest.raises(GraftError, match=r"diverges at every rate of 0\.001, 0\.1") as caught:
            graftc.sweep(SPEC, MODEL, runs.train, function, rates=(1e-3, 1e-1))
        assert caught.value.code == "GC181"
    else:
        assert graftc.sweep(SPEC, MODEL, runs.train, function, rates=(1e-1, 1e-3)).rate == rate


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": []}, "rates is empty"),
        ({"rates": 1e-3}, "rates is"),
        ({"rates": "1e-3"}, "rates is"),
        ({"rates": [1e-3, 0]}, "rates has 0"),
        ({"rates": [float("nan")]}, "rates has nan"),
        ({"rates": [True]}, "rates has True"),
        ({"rates": [1e-3, 0.001]}, "0.001 twice"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 1]}, "seeds has one twice"),
        ({"seeds": 3}, "seeds is"),
        ({"seeds": [0.5]}, "the seed must be"),
        ({"test": 3}, "test is"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before anything is trained or written."""
    runs = Runs()
    assert message in refused(lambda: runs.sweep(tmp_path / "new", **options), code="GC073").message
    assert not runs.trained and not (tmp_path / "new").exists()


def test_another_spec_needs_another_folder(tmp_path: Path) -> None:
    Runs().sweep(tmp_path, seeds=[0])
    other = {"adapt": [{**SPEC["adapt"][0], "rank": 3}]}
    runs = Runs()
    call = lambda: graftc.sweep(other, MODEL, runs.train, runs.score, rates=RATES, folder=tmp_path)  # noqa: E731
    assert "different sweep" in refused(call, code="GC058").message and not runs.trained


@pytest.mark.sample("{", "{}")
@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"score": "good", "test": null}', '{"score": {}, "test": 1}'])
def test_a_damaged_score_is_refused(text: str, tmp_path: Path) -> None:
    Runs().sweep(tmp_path, seeds=[0])
    next((tmp_path / "trials").iterdir()).write_text(text, encoding="utf-8")
    assert "is damaged" in refused(lambda: Runs().sweep(tmp_path, seeds=[0]), code="GC058").message


def test_rates_that_look_the_same_are_told_apart(tmp_path: Path) -> None:
    """Their scores are in files of their own."""
    rates = (0.012345678, 0.012345679)
    runs = Runs()
    assert len({trial.score for trial in runs.sweep(tmp_path, rates=rates, seeds=[0]).trials}) == 2
    assert runs.trained == [*rates] and len([*(tmp_path / "trials").iterdir()]) == 2


def test_scores_are_strict_json(tmp_path: Path) -> None:
    Runs().sweep(tmp_path, seeds=[0])
    values = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "trials").iterdir()]
    assert sorted(value["rate"] for value in values) == [*RATES]
    assert sum(value["test"] is None for value in values) == 2
    assert isinstance(Trial(1e-3, 0, 0.5).test, float)
