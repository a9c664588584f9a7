"""Run a script of TRL's command line with a trainer over a compiled model.

TRL's script runs as it is: ``trl.scripts.sft.main`` loads the data, finds reward functions, trains, saves and uploads.
It creates one object, of a class that it takes from ``trl`` when it runs, and this class is replaced for the duration
of the run by a function that loads the base, compiles it and creates TRL's trainer over it. The alternative, a script
of our own, would have to repeat what TRL's scripts do, and would miss whatever the next release adds to them. A new
base needs no more than the arguments with which scripts create trainers, ``trl.trainer.utils.create_model_from_path``
and ``trl.get_peft_config``, all of which are public names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from graftc.applications.trl.adapting import (
    compiled_for,
    load_as_trl,
    parsed_spec,
    require_for_peft,
    write_adapter,
)
from graftc.applications.trl.refusals import check_settings
from graftc.applications.trl.settings import TRAINERS, TrlSettings, package, script_of
from graftc.files.destinations import check_destination, holds
from graftc.runtime.artifact.places import is_ours
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError, first_line

_WITHOUT_REFERENCE = ("sft", "reward")
"""Trainers without a reference model."""

_LOADING = ("grpo", "rloo")
"""Trainers that load reward models with the options for loading models."""


@dataclass(frozen=True)
class TrlRun:
    """The outcome of a run.

    Attributes:
        folder: TRL's ``output_dir``.
        adapter: whether the folder contains an adapter for PEFT; without, it contains a state dict of the compiled
            model, which `graftc.load` reads.
        artifact: the artifact; None if none was asked for.
        losses: the losses that the trainer logged.
        steps: the number of optimiser steps.
        compiled: the trained model.
    """

    folder: Path
    adapter: bool
    artifact: Path | None
    losses: tuple[float, ...]
    steps: int
    compiled: Compiled


def train(settings: TrlSettings) -> TrlRun:
    """Train a compiled model in the way in which ``trl TRAINER --config FILE`` trains a model of PEFT.

    Args:
        settings: what `read_settings` has returned.

    Raises:
        GraftError: GC061 without TRL or PEFT, GC063 for an artifact that exists, GC072 and GC200 for settings that
            cannot be honoured, GC115 for a spec that PEFT cannot express if no artifact is to be written, GC130 for
            several processes, GC201 for whatever stops TRL before its first step; as `graftc.compile` does for a spec
            or a model that it refuses.
    """
    check_settings(settings)
    if settings.spec is not None:
        settings = replace(settings, spec=parsed_spec(settings.spec))
    if settings.artifact is not None:
        check_destination(settings.artifact, replaceable=is_ours)
        if holds(settings.artifact, out := Path(settings.training.output_dir)) or holds(out, settings.artifact):
            raise GraftError(
                "GC063", f"{settings.artifact} overlaps output_dir, {out}", hint="write it beside output_dir"
            )
    trl = package("trl")
    created: list[_Created] = []
    start = _start()
    kind = getattr(trl, TRAINERS[settings.trainer])

    def create(**arguments: Any) -> Any:
        created.append(_create(kind, settings, arguments, start))
        return created[-1].trainer

    with mock.patch.object(trl, TRAINERS[settings.trainer], create), _starting(settings, start):
        script_of(settings.trainer).main(settings.script, settings.training, settings.model, settings.datasets)
    result = created[-1]
    if settings.artifact is not None:
        result.compiled.eval().save(settings.artifact)
    history = result.trainer.state.log_history
    return TrlRun(
        Path(settings.training.output_dir),
        result.adapter,
        settings.artifact,
        tuple(float(entry["loss"]) for entry in history if "loss" in entry),
        int(result.trainer.state.global_step),
        result.compiled,
    )


@dataclass(frozen=True)
class _Created:
    """A trainer that a script created, with its model."""

    trainer: Any
    compiled: Compiled
    adapter: bool


def _start() -> Any:
    """Return a callback for a trainer that records in ``begun`` whether the first step has begun."""
    from transformers import TrainerCallback

    class Start(TrainerCallback):
        begun = False

        def on_step_begin(self, *rest: Any, **more: Any) -> None:
            self.begun = True

    return Start()


@contextmanager
def _starting(settings: TrlSettings, start: Any) -> Iterator[None]:
    """Turn what libraries raise before the first step into GC201; later errors pass."""
    try:
        yield
    except GraftError:
        raise
    except Exception as error:  # scripts load data, reward functions, models and checkpoints of any kind
        if start.begun:
            raise
        resumed = settings.training.resume_from_checkpoint
        check = f"check whether {resumed} is a complete checkpoint, or " if isinstance(resumed, str) else ""
        raise GraftError("GC201", first_line(error), hint=f"{check}set GRAFTC_DEBUG=1 for a traceback") from error


def _create(kind: Any, settings: TrlSettings, arguments: dict[str, Any], start: Any) -> _Created:
    """Return the trainer for the arguments with which a script creates one, with another callback."""
    # The quantization_config is None: quantised loading has been refused.
    replaced = ("model", "args", "peft_config", "quantization_config")
    others = {name: value for name, value in arguments.items() if name not in replaced}
    model, tokenizer = load_as_trl(settings)
    compiled = compiled_for(settings, model)
    adapter = True
    try:
        require_for_peft(compiled)
    except GraftError as error:
        if settings.artifact is None:
            hint = "write an artifact as well, with --artifact DIR"
            raise GraftError(error.code, error.message, place=error.place, hint=hint, details=error.details) from None
        adapter = False
    others |= {"processing_class": tokenizer, "callbacks": [compiled.callback(), start]}
    kind = _saving(kind, compiled) if adapter else kind
    training = settings.training
    options = training.model_init_kwargs
    if settings.trainer not in _LOADING:
        training.model_init_kwargs = None  # the model has been loaded, and TRL would warn that it ignores them
    try:
        if settings.trainer in _WITHOUT_REFERENCE:
            trainer = kind(model=compiled, args=training, **others)
        else:
            trainer = compiled.trainer(kind, args=training, **others)
    finally:
        training.model_init_kwargs = options
    return _Created(trainer, compiled, adapter)


def _saving(kind: Any, compiled: Compiled) -> Any:
    """Return a trainer's class whose ``output_dir`` gets an adapter for PEFT; checkpoints stay state dicts."""

    class Saving(kind):  # type: ignore[misc]
        def save_model(self, output_dir: str | None = None, *rest: Any, **more: Any) -> None:
            folder = self.args.output_dir if output_dir is None else output_dir
            if Path(folder).resolve() != Path(self.args.output_dir).resolve():
                super().save_model(output_dir, *rest, **more)
            elif self.args.should_save:
                write_adapter(compiled, Path(folder))
                self.processing_class.save_pretrained(folder)
                torch.save(self.args, Path(folder) / "training_args.bin")  # as every trainer does

    Saving.__name__, Saving.__qualname__ = kind.__name__, kind.__qualname__
    return Saving
