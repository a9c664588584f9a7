"""Read what TRL's command line reads, with TRL's own parser, before anything is loaded.

TRL's parser belongs to the script of a trainer; only the class with graftc's own two keys is added to it. An error of
the parser becomes a `GraftError` that names the key.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, correction, first_line
from graftc.specs.errors.packages import optional_package
from graftc.specs.regular_files import read_regular
from graftc.specs.source import FILE, read_yaml

TRAINERS: Mapping[str, str] = {
    "sft": "SFTTrainer",
    "dpo": "DPOTrainer",
    "reward": "RewardTrainer",
    "kto": "KTOTrainer",
    "grpo": "GRPOTrainer",
    "rloo": "RLOOTrainer",
}
"""The trainers of TRL's command line that graftc trains with, each with the class that its script creates."""


@dataclass
class GraftcArguments:
    """The keys that a config may have in addition to TRL's."""

    graftc_spec: str | None = field(
        default=None, metadata={"help": "A graftc spec in place of PEFT's settings: its file, or in YAML the spec."}
    )
    graftc_artifact: str | None = field(
        default=None, metadata={"help": "The folder to create for the artifact of the trained model."}
    )


@dataclass(frozen=True)
class TrlSettings:
    """The settings of one run, as TRL's script receives them.

    Attributes:
        trainer: the name of the trainer, such as ``sft``.
        script: the arguments of the script: the dataset, and reward functions.
        training: the config of the trainer.
        model: the config of the model, with PEFT's settings.
        datasets: the mixture of datasets.
        spec: the graftc spec: a path or a mapping; None if PEFT's settings are used.
        artifact: the folder of the artifact; None for none.
    """

    trainer: str
    script: Any
    training: Any
    model: Any
    datasets: Any
    spec: str | Mapping[str, Any] | None
    artifact: Path | None


def package(name: str) -> Any:
    """Return a package of the extra ``trl``.

    Raises:
        GraftError: GC061 if it cannot be imported.
    """
    return optional_package(name, "graftc trl", "trl")


def script_of(trainer: str) -> Any:
    """Return the module of a trainer's script in TRL.

    Raises:
        GraftError: GC061 without TRL.
    """
    package("trl")
    return importlib.import_module(f"trl.scripts.{trainer}")


def read_settings(
    trainer: str,
    config: Path | None,
    options: Sequence[str] = (),
    *,
    spec: Path | None = None,
    artifact: Path | None = None,
) -> TrlSettings:
    """Read a config and options in the way that ``trl TRAINER --config FILE`` does.

    Args:
        trainer: a key of `TRAINERS`.
        config: the YAML file.
        options: further options of TRL, as on its command line; they take precedence over the file.
        spec, artifact: take precedence over the keys ``graftc_spec`` and ``graftc_artifact``.

    Raises:
        GraftError: GC061 without TRL, GC200 for a file or options that TRL's parser does not accept.
    """
    place = str(config) if config is not None else "the options"
    if config is not None:
        _require_plain(config, trainer)
    known = script_of(trainer).make_parser().dataclass_types
    parser = package("trl").TrlParser((*known, GraftcArguments), prog=f"graftc trl {trainer}")

    def refuse(message: str) -> Any:
        raise GraftError("GC200", f"{place}: {message}", hint=_help(trainer))

    parser.error = refuse  # argparse would print all options and exit
    words = [*(["--config", str(config)] if config is not None else []), *options]
    try:
        read = parser.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)
    except GraftError:
        raise
    except Exception as error:  # the parser passes on whatever reading the file or a dataclass raises
        raise GraftError("GC200", f"{place}: {first_line(error)}", hint=_help(trainer)) from error
    *parsed, of_config, of_line = read
    _require_known(place, [*_keys(of_config), *_keys(of_line)], parser.dataclass_types)
    script, training, model, datasets, own = parsed
    spec_or_path = own.graftc_spec if spec is None else str(spec)
    if not isinstance(spec_or_path, str | Mapping | None):
        refuse(f"graftc_spec is {type(spec_or_path).__name__}, neither a path nor a spec")
    destination = own.graftc_artifact if artifact is None else artifact
    folder = None if destination is None else Path(destination).expanduser()
    return TrlSettings(trainer, script, training, model, datasets, spec_or_path, folder)


def _require_plain(config: Path, trainer: str) -> None:
    """Raise if a file is not YAML within the limits of specs, or sets environment variables.

    TRL's parser has no limits: a few aliases of aliases would fill the memory.
    """
    try:
        text = read_regular(config, FILE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise GraftError("GC200", f"{config}: {first_line(error)}", hint=_help(trainer)) from error
    try:
        content, _ = read_yaml(text, str(config))
    except GraftError as error:
        raise GraftError("GC200", f"{config}: {error.message}", hint=error.hint, place=error.place) from error
    if isinstance(content, dict) and "env" in content:
        message = f"{config}: env would set environment variables of graftc's own process"
        raise GraftError("GC200", message, hint="set them where graftc is started")


def _keys(words: Sequence[str]) -> list[str]:
    """Return the keys among words that the parser did not use; a word without dashes is its own key."""
    keys = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    return keys or list(words[:1])


def _require_known(place: str, unknown: Sequence[str], classes: Sequence[Any]) -> None:
    if not unknown:
        return
    known = sorted({name for each in classes for name in each.__dataclass_fields__})
    hint, _ = correction(unknown[0], known, "remove it; options of accelerate launch have no effect here")
    what = "unknown key" if len(unknown) == 1 else "unknown keys"
    raise GraftError("GC200", f"{place}: {what} {', '.join(unknown)}", hint=hint)


def _help(trainer: str) -> str:
    return f"trl {trainer} --help lists the keys and their values"
