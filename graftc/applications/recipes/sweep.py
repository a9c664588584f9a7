"""Sweeps: train a spec at several learning rates, and with further seeds at the best one."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from graftc.applications.recipes.folder import begin_recipe, make_folder
from graftc.applications.recipes.tune import Train, tune
from graftc.compiler.capture.interface import ExampleInputs
from graftc.files.writing import alone_in, write_text
from graftc.runtime.api import SpecLike, spec_for
from graftc.runtime.compiled import Compiled
from graftc.runtime.swapped_arguments import check_spec_and_model
from graftc.runtime.training.selecting import Loss
from graftc.specs.errors.arguments import as_path, as_seed, kind_of
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.regular_files import JSON_BYTES, read_regular
from graftc.specs.strict_json import read_json

Measure = Callable[[Compiled], float]
"""A function that returns how good a trained model is, higher is better."""


@dataclass(frozen=True)
class Trial:
    """A model that was trained in a sweep.

    Attributes:
        rate: the learning rate.
        seed: the seed.
        score: its score, by which rates are compared; NaN if training diverged.
        test: its test score; NaN if it was not tested, as at any rate other than the best.
    """

    rate: float
    seed: int
    score: float
    test: float = math.nan


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Attributes:
        trials: every trained model, rates first, then further seeds.
        rate: the learning rate with the highest score.
        model: the model at that rate with the first seed, in eval mode.
    """

    trials: tuple[Trial, ...]
    rate: float
    model: Compiled

    @property
    def best(self) -> tuple[Trial, ...]:
        """The trials at the best rate, by seed."""
        return tuple(trial for trial in self.trials if trial.rate == self.rate)

    @property
    def is_at_the_end(self) -> bool:
        """Whether the best rate is the lowest or the highest one, so that a better one may lie beyond."""
        rates = [trial.rate for trial in self.trials]
        return self.rate in (min(rates), max(rates))

    def __str__(self) -> str:
        lines = [f"{'rate':>10}  {'seed':>6}  {'score':>9}  {'test':>9}"]
        lines += [f"{t.rate:>10g}  {t.seed:>6}  {t.score:>9.4g}  {t.test:>9.4g}" for t in self.trials]
        tests = [t.test for t in self.best if not math.isnan(t.test)]
        name, values = ("test", tests) if tests else ("score", [t.score for t in self.best])
        spread = f", standard deviation {statistics.stdev(values):.2g}" if len(values) > 1 else ""
        end = ", which is at the end of the sweep" if self.is_at_the_end else ""
        lines.append(f"best rate {self.rate:g}{end}: mean {name} {statistics.fmean(values):.4g}{spread}")
        return "\n".join(lines)


@public("graftc.sweep")
def sweep(
    spec: SpecLike,
    model: nn.Module,
    train: Train,
    score: Measure,
    *,
    rates: Sequence[float],
    seeds: Sequence[int] = (0,),
    test: Measure | None = None,
    examples: Iterable[Mapping[str, Any]] | None = None,
    loss: Loss | None = None,
    folder: str | Path | None = None,
    example_inputs: ExampleInputs | None = None,
) -> Sweep:
    """Train a spec at each learning rate with the first seed, and with the other seeds at the best rate.

    Each training is a `graftc.tune`, whose ``train`` finds its learning rate in ``stage.rate``. Rates are compared by
    ``score``; choose texts for it that are neither trained on nor tested with. Equal scores go to the lower rate.

    Args:
        spec: as for `graftc.tune`.
        model: as for `graftc.tune`.
        examples: as for `graftc.tune`.
        loss: as for `graftc.tune`.
        example_inputs: as for `graftc.tune`.
        train: as for `graftc.tune`.
        score: a function that returns the score of a trained model, such as its accuracy on validation data. A score
            that is not finite means that training diverged, and is below every number.
        rates: the learning rates, for example ``[3e-4, 1e-3, 3e-3]``.
        seeds: the seeds, of which the first compares the rates.
        test: a function that returns the test score of a model at the best rate.
        folder: the folder for the scores and the trained models. If the process is killed, the same call resumes; with
            more rates or seeds, it computes only what is new. Use another folder after changing one of the functions or
            the data.

    Returns:
        The trials, the best rate, and its model.

    Raises:
        GraftError: GC073 for rates that are not positive numbers or occur twice, or functions that cannot be called;
            GC181 if training diverges at every rate; otherwise as for `graftc.tune`.
    """
    check_spec_and_model("graftc.sweep", spec, model)
    for name, function in (("train", train), ("score", score), ("test", test)):
        if not callable(function) and not (name == "test" and function is None):
            raise GraftError("GC073", f"{name} is {kind_of(function)}", hint=f"pass a function as {name}")
    sorted_rates, distinct_seeds = _checked_rates(rates), _checked_seeds(seeds)
    loaded = spec_for(spec, model, example_inputs)
    place = as_path(folder) if folder is not None else None
    if place is not None:
        begin_recipe(place, {"sweep": loaded.model_dump(mode="json")})
    batches = None if examples is None else list(examples)  # every training reads them again

    def trained(rate: float, seed: int) -> Compiled:
        own = None if place is None else place / _name(rate, seed)
        at_rate: Train = lambda compiled, stage: train(compiled, replace(stage, rate=rate))  # noqa: E731
        return tune(
            loaded, model, at_rate, examples=batches, loss=loss, folder=own, example_inputs=example_inputs, seed=seed
        )

    with alone_in(place):
        return _Trials(trained, score, test, place).run(sorted_rates, distinct_seeds)


def _name(rate: float, seed: int) -> str:
    return f"rate-{rate!r}-seed-{seed}"


class _Trials:
    """The trials of a sweep, with their scores in a folder."""

    def __init__(
        self, trained: Callable[[float, int], Compiled], score: Measure, test: Measure | None, folder: Path | None
    ) -> None:
        self._trained, self._score, self._test, self._folder = trained, score, test, folder

    def run(self, rates: Sequence[float], seeds: Sequence[int]) -> Sweep:
        """Return the sweep. At any time, at most two trained models are in memory."""
        first, *others = seeds
        swept: list[Trial] = []
        best: Trial | None = None
        model: Compiled | None = None
        for rate in rates:
            trial, compiled = self._trial(rate, first)
            swept.append(trial)
            if best is None or trial.score > best.score or math.isnan(best.score):
                best, model = trial, compiled
        if best is None or math.isnan(best.score):
            message = f"training diverges at every rate of {', '.join(f'{rate:g}' for rate in rates)}"
            raise GraftError("GC181", message, hint="add lower rates")
        model = self._trained(best.rate, first) if model is None else model
        tested = self._tested(best, model)
        further = [self._tested(*self._trial(best.rate, seed)) for seed in others]
        return Sweep((*(tested if trial is best else trial for trial in swept), *further), best.rate, model)

    def _trial(self, rate: float, seed: int) -> tuple[Trial, Compiled | None]:
        """Return a trial with its model, or without it if the score is in the folder."""
        recorded = self._read(rate, seed)
        if recorded is not None:
            return recorded, None
        model = self._trained(rate, seed)
        trial = Trial(rate, seed, _finite(self._score(model)))
        self._write(trial)
        return trial, model

    def _tested(self, trial: Trial, model: Compiled | None) -> Trial:
        """Return a trial with its test score."""
        if self._test is None or not math.isnan(trial.test):
            return trial
        model = self._trained(trial.rate, trial.seed) if model is None else model
        tested = replace(trial, test=_finite(self._test(model)))
        self._write(tested)
        return tested

    def _path(self, rate: float, seed: int) -> Path | None:
        return None if self._folder is None else self._folder / "trials" / f"{_name(rate, seed)}.json"

    def _write(self, trial: Trial) -> None:
        path = self._path(trial.rate, trial.seed)
        if path is not None:
            make_folder(path.parent)
            values = {"score": trial.score, "test": trial.test}
            shown = {name: None if math.isnan(value) else value for name, value in values.items()}
            write_text(path, json.dumps({"rate": trial.rate, "seed": trial.seed, **shown}), force=True)

    def _read(self, rate: float, seed: int) -> Trial | None:
        path = self._path(rate, seed)
        if path is None or not path.exists():
            return None
        try:
            data = read_json(read_regular(path), JSON_BYTES)
        except (OSError, ValueError):
            data = None
        if not (isinstance(data, dict) and all(_is_score(data.get(name, "?")) for name in ("score", "test"))):
            raise GraftError("GC058", f"{path} is damaged", hint="remove it: the trial is trained again")
        values = data["score"], data["test"]
        score, test = (math.nan if value is None else float(value) for value in values)
        return Trial(rate, seed, score, test)


def _is_score(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _finite(value: float) -> float:
    """Return a score as a number; NaN if it is infinite."""
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _checked_rates(rates: Any) -> list[float]:
    """Return learning rates from the lowest to the highest.

    Raises:
        GraftError: GC073 if they are not positive numbers, or one occurs twice.
    """
    hint = "list learning rates, for example [3e-4, 1e-3, 3e-3]"
    for rate in (listed := _listed(rates, "rates", hint)):
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise GraftError("GC073", f"rates has {rate!r}", hint=hint)
    if twice := [rate for number, rate in enumerate(listed) if rate in listed[:number]]:
        raise GraftError("GC073", f"rates has {twice[0]:g} twice", hint=hint)
    return sorted(map(float, listed))


def _checked_seeds(seeds: Any) -> list[int]:
    """Return seeds in their order.

    Raises:
        GraftError: GC073 if they are not 64-bit integers, or one occurs twice.
    """
    hint = "list whole numbers, for example range(5)"
    listed = [as_seed(seed) for seed in _listed(seeds, "seeds", hint)]
    if len(set(listed)) < len(listed):
        raise GraftError("GC073", "seeds has one twice", hint=hint)
    return listed


def _listed(values: Any, what: str, hint: str) -> list[Any]:
    """Return the values of any series as a list.

    Raises:
        GraftError: GC073 if it is not a series of values, or is empty.
    """
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise GraftError("GC073", f"{what} is {kind_of(values)}", hint=hint)
    if not (listed := list(values)):
        raise GraftError("GC073", f"{what} is empty", hint=hint)
    return listed
