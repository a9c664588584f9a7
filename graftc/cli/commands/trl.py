"""``graftc trl``: train from a config of TRL's command line."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from annotated_types import Ge

from graftc.cli import completion
from graftc.cli.command import CommandRun, command
from graftc.records.results import CommandResult
from graftc.specs.errors.text import counted

if TYPE_CHECKING:
    from rich.console import Console


class TrlTrainer(StrEnum):
    """The trainers of TRL's command line that graftc trains with."""

    SFT = "sft"
    DPO = "dpo"
    REWARD = "reward"
    KTO = "kto"
    GRPO = "grpo"
    RLOO = "rloo"


@dataclass(frozen=True, kw_only=True)
class TrlResult(CommandResult, behind={"artifact": ("warnings",)}):
    """`graftc trl TRAINER --config FILE --json`."""

    trainer: str
    """The TRAINER argument."""

    model: str
    """The config's `model_name_or_path`."""

    steps: Annotated[int, Ge(0)]
    """Optimiser steps."""

    losses: tuple[float, ...]
    """The losses that the trainer logged, in order."""

    trainable: Annotated[int, Ge(0)]
    """Elements that train."""

    out: str
    """The config's `output_dir`."""

    adapter: bool
    """Whether that folder contains an adapter that PEFT loads; if not, it contains a checkpoint that graftc loads."""

    artifact: str | None
    """The artifact's folder; null if none was asked for."""


@command(live=True, foreign=True)
def trl(
    run: CommandRun,
    trainer: Annotated[TrlTrainer, typer.Argument(metavar="TRAINER", help="A trainer.", show_default=False)],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="OPTION_OF_TRL",
            help="Further options of trl TRAINER, such as --learning_rate 1e-4, which take precedence over the file.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="The YAML file that trl TRAINER --config takes.",
            show_default=False,
            autocompletion=completion.specs,
        ),
    ] = None,
    spec: Annotated[
        Path | None,
        typer.Option(
            "--spec",
            metavar="SPEC",
            help="A spec in place of PEFT's settings (use_peft, lora_r, ...): a .yaml, .json or .toml file. Default: "
            "graftc_spec in the YAML file.",
            show_default=False,
            autocompletion=completion.specs,
        ),
    ] = None,
    artifact: Annotated[
        Path | None,
        typer.Option(
            "--artifact",
            metavar="DIR",
            help="Write an artifact of the trained model as well. Default: graftc_artifact in the YAML file.",
            show_default=False,
        ),
    ] = None,
) -> TrlResult:
    """Train from a config of TRL's command line, as trl TRAINER --config FILE does, with a compiled model."""
    with run.working():
        run.step("reading the config")
        from graftc.applications.trl.running import train
        from graftc.applications.trl.settings import read_settings
        from graftc.runtime.model.runner import runner_of

        settings = read_settings(trainer.value, config, options or (), spec=spec, artifact=artifact)
        run.step("training")
        done = train(settings)
        trainable, _ = runner_of(done.compiled).get_nb_trainable_parameters()
    return TrlResult(
        trainer=trainer.value,
        model=str(settings.model.model_name_or_path),
        steps=done.steps,
        losses=done.losses,
        trainable=trainable,
        out=str(done.folder),
        adapter=done.adapter,
        artifact=None if done.artifact is None else str(done.artifact),
    )


@trl.shows
def _show(result: TrlResult, to: Console) -> None:
    losses = f", loss {result.losses[0]:.4g} to {result.losses[-1]:.4g}" if result.losses else ""
    what = "an adapter for PEFT" if result.adapter else "a checkpoint for graftc.load"
    trained = f"{counted(result.trainable, 'element')}, {counted(result.steps, 'step')}{losses}"
    to.print(f"trained: {trained}", soft_wrap=True, markup=False)
    to.print(f"wrote {result.out}: {what}", soft_wrap=True, markup=False)
    if result.artifact is not None:
        to.print(f"wrote {result.artifact}: an artifact", soft_wrap=True, markup=False)
