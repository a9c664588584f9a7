"""Recipes: perform several training runs of a method as one, which can be resumed after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graftc.applications.recipes.folder import begin_recipe, make_folder, recorded_seed
from graftc.compiler.capture.interface import ExampleInputs
from graftc.files.writing import alone_in
from graftc.runtime.api import SpecLike, compile, spec_for
from graftc.runtime.compiled import Compiled
from graftc.runtime.loading.load import load
from graftc.runtime.seeds import seed_everything, starting_seed
from graftc.runtime.swapped_arguments import check_spec_and_model
from graftc.runtime.training.selecting import Loss
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import as_path, as_seed, kind_of
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError

RESULT = "result"


@dataclass(frozen=True)
class Stage:
    """One training run of a recipe.

    Attributes:
        number: the number of the run, from 1.
        total: the number of training runs.
        folder: a folder for the run's own files, such as checkpoints; None for a recipe that stores nothing. It is
            created when the run begins, and still exists when an interrupted run is repeated.
        rate: the learning rate, in a `graftc.sweep`; otherwise None.
    """

    number: int
    total: int
    folder: Path | None
    rate: float | None = None


Train = Callable[[Compiled, Stage], object]
"""A function that trains a model in place."""


@public("graftc.tune")
def tune(
    spec: SpecLike,
    model: nn.Module,
    train: Train,
    *,
    examples: Iterable[Mapping[str, Any]] | None = None,
    loss: Loss | None = None,
    folder: str | Path | None = None,
    example_inputs: ExampleInputs | None = None,
    seed: int | None = None,
) -> Compiled:
    """Perform every training run that a spec requires, calling ``train`` once for each with the model to train.

    Before each run, the random number generators of Python, NumPy and torch are seeded from ``seed`` and the number of
    the run, so that a run depends on earlier ones only through the tensors that it starts from. With a folder, these
    tensors are stored there: if the process is killed at any moment, the same call resumes at the beginning of the
    interrupted training run and ends with the same tensors.

    Args:
        spec: a `Spec`, a mapping, or the path of a file.
        model: the base; never changed.
        train: a function that trains a model, which is in train mode. It creates its own optimiser, because each run
            trains different tensors.
        examples: the examples by which entries are chosen, for methods that need them; see `Compiled.select`.
        loss: the loss for these examples.
        folder: the folder for the result and each training run's starting point; it is created if it does not exist.
        example_inputs: as for `graftc.compile`.
        seed: the seed for initial values and for the training runs; by default the seed with which the folder was
            begun, or else ``torch.initial_seed()``, as for `graftc.compile`.

    Returns:
        The trained model, in eval mode.

    Raises:
        GraftError: GC056 if examples are needed but not given, GC058 for a folder that contains another recipe or other
            files, GC063 if another run is using the folder, GC064 if it cannot be written, GC073 for arguments of the
            wrong type; otherwise as for `graftc.compile`.
    """
    check_spec_and_model("graftc.tune", spec, model)
    loaded = spec_for(spec, model, example_inputs)
    if not callable(train):
        raise GraftError("GC073", f"train is {kind_of(train)}", hint="pass a function that takes a model and a Stage")
    place = as_path(folder) if folder is not None else None
    if seed is None:
        begun = recorded_seed(place) if place is not None else None
        seed = starting_seed() if begun is None else begun
    chosen = as_seed(seed)
    kept = _Kept(place, loaded, chosen) if place is not None else None
    with alone_in(kept.folder if kept is not None else None):
        number, compiled = kept.latest(model) if kept is not None else (0, None)
        if compiled is None:
            number, compiled = 1, compile(loaded, model, example_inputs, seed=chosen)
            if compiled.uninitialised or compiled.unselected:
                compiled = _with_examples(compiled, examples, loss, chosen)
                if kept is not None:
                    kept.keep(compiled, number)
        return _trained(compiled, number, train, kept, chosen)


def _with_examples(
    compiled: Compiled, examples: Iterable[Mapping[str, Any]] | None, loss: Loss | None, seed: int
) -> Compiled:
    """Return the model with initial values, and then entries, that examples determine.

    Raises:
        GraftError: GC056 if no examples are given.
    """
    if examples is None:
        names = ", ".join(map(repr, (*compiled.uninitialised, *compiled.unselected)))
        raise GraftError("GC056", f"{names} starts from examples", hint="pass examples to tune")
    _seed(seed, 0)
    if compiled.uninitialised and compiled.unselected:
        examples = list(examples)
    if compiled.uninitialised:
        compiled = compiled.initialise(examples, loss=loss)
    if compiled.unselected:
        compiled = compiled.select(examples, loss=loss)
    return compiled


def _trained(compiled: Compiled, number: int, train: Train, kept: _Kept | None, seed: int) -> Compiled:
    """Run every training run that is not done yet, and return the trained model.

    Args:
        compiled: the model from which the next training run starts.
        number: the number of that run; 0 if all are done.
        train: the function that trains a model.
        kept: the recipe's folder, which stores each run's starting point; None to store nothing.
        seed: the seed for random numbers.
    """
    while number:
        total = number + compiled.stages_left
        start = (
            {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()} if total > number else {}
        )
        _seed(seed, number)
        train(compiled.train(), Stage(number, total, kept.scratch(number) if kept is not None else None))
        compiled.eval()
        if number == total:
            if kept is not None:
                kept.keep(compiled, 0)
            break
        compiled = compiled.advance(start)
        number += 1
        if kept is not None:
            kept.keep(compiled, number)
    return compiled.eval()


def _seed(seed: int, number: int) -> None:
    seed_everything((seed * 1_000_003 + number) % 2**32)


class _Kept:
    """A recipe's folder: ``recipe.json``, and artifacts with each training run's starting point and the result.

    Raises:
        GraftError: as for `begin_recipe`.
    """

    def __init__(self, folder: Path, spec: Spec, seed: int) -> None:
        self.folder = folder
        begin_recipe(folder, {"spec": spec.model_dump(mode="json"), "seed": seed})

    def latest(self, model: nn.Module) -> tuple[int, Compiled | None]:
        """Return the number of the training run to resume, and the model from which it starts.

        If all runs are done, these are 0 and the trained model; if nothing is stored, 0 and None.
        """
        if (self.folder / RESULT).exists():
            return 0, self._load(RESULT, model)
        numbers = [int(path.name.partition("-")[2]) for path in self.folder.glob("stage-*")]
        if not numbers:
            return 0, None
        return max(numbers), self._load(f"stage-{max(numbers)}", model)

    def _load(self, name: str, model: nn.Module) -> Compiled:
        try:
            return load(self.folder / name, model)
        except GraftError as error:
            if error.code != "GC087":
                raise
            message = f"{self.folder} contains a recipe with a different base"
            raise GraftError("GC058", message, details=[error.message]) from error

    def keep(self, compiled: Compiled, number: int) -> None:
        """Save the starting point of the training run with this number; number 0 is the result."""
        compiled.save(self.folder / (f"stage-{number}" if number else RESULT), certify=False)
        before = self.folder / f"training-{number - 1}"
        if number > 1 and before.exists():
            shutil.rmtree(before, ignore_errors=True)

    def scratch(self, number: int) -> Path:
        """Create and return a folder for a training run's own files."""
        return make_folder(self.folder / f"training-{number}")
