"""Training logs, which record the loss and the figures of each site as lines of JSON in a file."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor

from graftc.compiler.figures import Figures, as_numbers
from graftc.passes.core.weights.sharding import sharded_modules
from graftc.runtime.artifact.manifest import MANIFEST
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.runtime.training.callbacks import for_trainer
from graftc.runtime.training.curves import last_step
from graftc.runtime.training.observing import Observer
from graftc.runtime.training.steering import TrainingSteering
from graftc.specs.errors.arguments import as_path, kind_of, require_count
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import encodable

if TYPE_CHECKING:
    from transformers import TrainerCallback


_OWN = ("step", "time", "figures")


class TrainingLog:
    """Records a training run: the loss, other values that the loop passes, and figures that describe each site.

    A line of JSON is appended at the first optimiser step and at every ``every``-th one: ``{"step": 10,
    "time": 1766000000.0, "loss": 0.69, "figures": {"adalora": {"encoder.layer.0...": {"rank": 6.0}}}}``. ``figures``
    contains the values of `Compiled.site_figures` and, from the forward pass, the mean values of gates (UniPELT,
    ``compose: gate``) and the indices of the experts that were drawn (AdaMix); the latter two are not available from
    code compiled by `torch.compile`. A line contains only the figures that have changed since the previous line.
    Nothing is computed at other steps.

    An existing file is continued. `read_log` reads it back. With several processes, each process has to create a log,
    but only the first one writes.

    Args:
        compiled: the model that trains.
        path: the file, which is created if it is missing. It cannot be inside an artifact, which may not contain other
            files.
        every: the number of optimiser steps between two lines.

    Raises:
        GraftError: GC063 for a file inside an artifact, GC064 if it cannot be written, GC073 for arguments of the wrong
            type.
    """

    def __init__(
        self,
        compiled: ModelRoot | AdaptedRunner,
        path: str | os.PathLike[str] = "training_log.jsonl",
        *,
        every: int = 10,
    ) -> None:
        runner: Any = runner_of(compiled)
        if not isinstance(runner, AdaptedRunner):
            raise GraftError("GC073", "this model cannot be trained", hint="pass the result of graftc.compile")
        require_count(every, "every", "pass a number of optimiser steps, at least 1", least=1)
        self.path, self.every = as_path(path), every
        _require_outside(self.path)
        self._runner, self._observer = runner, Observer(runner.compilation)
        self._written: Figures = {}
        self._first = True
        self._writes = not (torch.distributed.is_initialized() and torch.distributed.get_rank())
        self._number = last_step(self.path) or 0
        if self._writes:
            self._append(b"" if _ends_well(self.path) else b"\n")
        self.expect(self._number + 1)

    def step(self, number: int | None = None, /, **values: Any) -> bool:
        """Record that an optimiser step has been taken; call this after ``compiled.after_step()``.

        Args:
            number: the number of the step, counted from 1; by default the previous one plus 1. After resuming from a
                checkpoint in the middle of the log, pass the step's number: repeated steps replace those in the log.
            values: numbers or one-element tensors, which are read only when a line is written: ``loss=loss``.
                Non-finite values are written as null.

        Returns:
            Whether a line was written.

        Raises:
            GraftError: GC064 if the file cannot be written, GC073 for a value that is not a number.
        """
        number = self._number + 1 if number is None else number
        require_count(number, "the number of the step", "count optimiser steps from 1")
        due = self._due(number)
        if due:
            self._record(number, values, self._changes())
        self._number = number
        self.expect(number + 1)
        return due

    def note(self, number: int, /, **values: Any) -> None:
        """Write a line with only these values, such as those of an evaluation, regardless of ``every``.

        Args:
            number: the optimiser step to which the values belong.
            values: as for `step`.

        Raises:
            GraftError: as for `step`.
        """
        self._record(number, values, None)

    def callback(self) -> TrainerCallback:
        """Return a callback that writes this log in the transformers Trainer, including what the Trainer itself logs.

        Pass it to the Trainer after ``compiled.callback()``.
        """
        return cast("TrainerCallback", for_trainer(_Logging)(self))

    def close(self) -> None:
        """Stop observing forward passes."""
        self._runner.progress.observer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _due(self, number: int) -> bool:
        return self._first or number % self.every == 0

    def expect(self, number: int) -> None:
        """Set the step to which the next forward passes belong, if it is not the next step."""
        self._runner.progress.observer = self._observer if self._due(number) else None

    def _changes(self) -> Figures | None:
        """Return the figures that have changed since the previous lines; None in a process that does not write."""
        self._first = False
        if not self._writes and not any(sharded_modules(self._runner.compilation.store.root)):
            return None
        now = as_numbers([*TrainingSteering(self._runner).figures(), *self._observer.figures()])
        changes: Figures = {}
        for adaptation, sites in now.items():
            for site, figures in sites.items():
                before = self._written.get(adaptation, {}).get(site, {})
                new = {name: value for name, value in figures.items() if before.get(name) != value}
                if new:
                    changes.setdefault(adaptation, {})[site] = new
        self._written = now
        return changes

    def _record(self, number: int, values: dict[str, Any], figures: Figures | None) -> None:
        if taken := [name for name in _OWN if name in values]:
            raise GraftError("GC073", f"{taken[0]!r} is a field that the log itself writes", hint="choose another name")
        if not self._writes:
            return
        line: dict[str, Any] = {"step": number, "time": round(time.time(), 3)}
        line |= {name: _plain(name, value) for name, value in values.items()}
        if figures is not None:
            line["figures"] = {
                a: {s: {n: _rounded(v) for n, v in numbers.items()} for s, numbers in sites.items()}
                for a, sites in figures.items()
            }
        self._append(json.dumps(encodable(line), allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n")

    def _append(self, text: bytes) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab", buffering=0) as file:
                file.write(text)
        except OSError as error:
            raise GraftError("GC064", f"{self.path} cannot be written: {error.strerror or error}") from error


class _Logging:
    """A callback that passes the Trainer's steps, and then the values that it logs for them, to a log."""

    def __init__(self, log: TrainingLog) -> None:
        self.log = log

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the first step, whose number the Trainer knows."""
        self.log.expect(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Record the step, after the optimiser and the controllers have run."""
        self.log.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write the values that the Trainer logs for training and evaluation."""
        numbers = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        self.log.note(state.global_step, **{n: v for n, v in numbers.items() if n not in _OWN})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop observing, since later forward passes do not belong to the training run."""
        self.log.close()


def _plain(name: str, value: Any) -> float | int | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.detach().item()
    if hasattr(value, "item") and not isinstance(value, Tensor):  # a NumPy scalar
        value = value.item()
    if isinstance(value, bool | int):
        return int(value)
    if not isinstance(value, float):
        raise GraftError("GC073", f"{name} is {kind_of(value)}", hint="pass numbers or one-element tensors")
    return _rounded(value)


def _rounded(value: float) -> float | None:
    """Round a value to seven digits, the precision of float32; return None for a non-finite value."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _ends_well(path: Path) -> bool:
    """Return whether the last line is complete; a process that was killed may leave a partial line."""
    try:
        with path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    except OSError:
        return True


def _require_outside(path: Path) -> None:
    """Raise if the file is inside an artifact: artifacts with files that their manifest does not list cannot be opened.

    Raises:
        GraftError: GC063.
    """
    for folder in Path(os.path.realpath(path)).parents:
        try:
            with (folder / MANIFEST).open("rb") as file:
                ours = b'"artifact": "graftc"' in file.read(64)
        except OSError:
            continue
        if ours:
            message = f"{path} is inside the artifact {folder}, which may contain only the files its manifest lists"
            raise GraftError("GC063", message, hint=f"write it next to the folder: {folder.parent / path.name}")
