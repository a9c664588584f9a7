"""``graftc pet``: train a classifier from patterns and few labelled rows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge

from graftc.cli import completion
from graftc.cli.command import CommandRun, command
from graftc.cli.options import ModelOption
from graftc.cli.process import interrupted
from graftc.records.applications.pet import Accuracy, PetGeneration, PetMember, PetRows
from graftc.records.fields import GivenModel, GivenSpec
from graftc.records.results import CommandResult

if TYPE_CHECKING:
    from rich.console import Console


TOKENIZER = "tokenizer"
"""The name of the tokenizer's folder within a run's folder."""


@dataclass(frozen=True, kw_only=True)
class PetRunResult(CommandResult, behind={"classifier": ("warnings",)}):
    """`graftc pet SPEC --json`."""

    spec: GivenSpec

    data: str
    """The `--data` option."""

    model: GivenModel

    out: str
    """The folder of the run; its `classifier` is an artifact."""

    tokenizer: str
    """The folder of the classifier's tokenizer, in that of the run."""

    seed: Annotated[int, Ge(0)]
    """Seed of all random numbers."""

    labels: tuple[str, ...]
    """The labels, in the order of logits."""

    rows: PetRows
    """How many rows there are."""

    members: tuple[PetMember, ...]
    """The ensemble."""

    generations: tuple[PetGeneration, ...]
    """Generations behind the first; none without `ipet`."""

    ensemble: Accuracy
    """Of the ensemble."""

    classifier: Accuracy
    """Of the classifier."""


@command(live=True)
def pet(
    run: CommandRun,
    spec: Annotated[
        Path,
        typer.Argument(
            metavar="SPEC",
            help="Patterns, words and training settings: a .yaml, .json or .toml file.",
            show_default=False,
            autocompletion=completion.specs,
        ),
    ],
    model: ModelOption,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            metavar="DIR",
            help="A folder with rows: train (labelled; may be missing), unlabelled, test (may be missing), each as "
            ".jsonl, .csv or .tsv.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="The run's folder: stages, results.json, the artifact `classifier` and its `tokenizer`. An "
            "interrupted run resumes there.",
            show_default=False,
        ),
    ],
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed for all random numbers.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="NAME",
            help="Folder or hub id of the tokenizer. Default: the model's.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="NAME", help="Device to train on, such as cuda. Default: the CPU."),
    ] = None,
) -> PetRunResult:
    """Train a classifier from patterns and few labelled rows (PET, iPET): members fill blanks and label the unlabelled
    rows, from which a classifier learns.
    """
    from graftc.specs.pet.io import load_pet_spec

    with _resumable(), run.working():
        loaded = load_pet_spec(spec)  # before torch is imported
        run.step("loading the model")
        from graftc.applications.chat.opening import moved, tokenizer_of
        from graftc.applications.pet.data import load_pet_data
        from graftc.applications.pet.recipe import pet as run_pet
        from graftc.applications.recipes.folder import RECIPE
        from graftc.files.writing import check_apart, check_folder
        from graftc.runtime.sources.models import load_model, local_folder, quiet_transformers

        check_apart(out, spec, data, model)
        check_folder(out, RECIPE)
        rows = load_pet_data(data, loaded.labels, loaded.slots)
        base = load_model(model)
        words = tokenizer_of(tokenizer, [Path(model).expanduser(), local_folder(base)])
        if device is not None:
            base = moved(base, device)
        counts = {"labelled": rows.train, "unlabelled": rows.unlabelled, "test": rows.test}
        said = ", ".join(f"{len(part) if part else 0:,} {name}" for name, part in counts.items())
        run.step(f"training, rows: {said}")
        with quiet_transformers(), _told(run.as_json, f"rows: {said}"):
            result = run_pet(loaded, base, words, rows, folder=out, seed=seed)
            kept = _keep_tokenizer(words, out)
    return PetRunResult(
        spec=str(spec),
        data=str(data),
        model=model,
        out=str(out),
        tokenizer=str(kept),
        seed=seed,
        labels=tuple(result.labels),
        rows=result.rows,
        members=tuple(result.members),
        generations=tuple(result.generations),
        ensemble=result.ensemble,
        classifier=result.final,
    )


@pet.shows
def _show(result: PetRunResult, to: Console) -> None:
    from graftc.cli.output import print_table

    judged = [name for name in ("labelled", "test") if result.rows[name]]
    columns = ["", "weight", *(f"{when}, {name}" for when in ("untrained", "trained") for name in judged)]
    rows = [
        [
            f"{member.pattern} #{member.repetition + 1}",
            f"{member.weight:.3f}",
            *_percents(member.untrained, judged),
            *_percents(member.trained, judged),
        ]
        for member in result.members
    ]
    blank = [""] * len(judged)
    rows.append(["ensemble", "", *blank, *_percents(result.ensemble, judged)])
    rows.append(["classifier", "", *blank, *_percents(result.classifier, judged)])
    print_table(to, columns, rows, right=columns[1:])
    for number, generation in enumerate(result.generations, 1):
        low, high = min(generation.examples), max(generation.examples)
        some = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lacking = ", ".join(f"{label} {count:g}" for label, count in generation.missing.items() if count)
        line = f"generation {number}: {some} more rows for each member"
        to.print(f"{line}; too few of {lacking}" if lacking else line, soft_wrap=True, markup=False)
    to.print(f"wrote {Path(result.out) / 'classifier'}", soft_wrap=True, markup=False)
    to.print(f"its tokenizer: {result.tokenizer}", soft_wrap=True, markup=False)


def _keep_tokenizer(tokenizer: Any, out: Path) -> Path:
    """Write the run's tokenizer, and return its folder.

    It is written each time, since an existing one may be incomplete.
    """
    from graftc.files.tensors.writing import writing
    from graftc.files.writing import staged

    place = out / TOKENIZER
    with staged(place, force=True, replaceable=Path.is_dir) as staging, writing(place):
        tokenizer.save_pretrained(staging)
    return place


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    """Run a block that the same command can resume, and print a message to that effect if it is interrupted."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or interrupted():  # libraries turn it into other errors
            _say("interrupted: run the same command again to resume")
        raise


@contextlib.contextmanager
def _told(as_json: bool, first: str) -> Iterator[None]:
    """While the block runs, print a line to stderr whenever training enters a new phase.

    Nothing is printed with JSON, or on a terminal, which already shows progress.
    """
    from graftc.passes.core.progress import listening

    if as_json or sys.stderr.isatty():
        yield
        return
    _say(first)
    last = ""

    def tell(at: str, seconds: float) -> None:
        nonlocal last
        now, colon, _ = at.partition(":")
        # The phases of a compile, which comes between any two training runs, have no colon.
        if now != last and (colon or now.startswith("asking")):
            last = now
            _say(f"{now}, after {seconds:.0f} s")

    with listening(tell):
        yield


def _say(text: str) -> None:
    with contextlib.suppress(Exception):  # a message that cannot be printed is not a failure
        print(text, file=sys.stderr, flush=True)


def _percents(accuracies: Mapping[str, Any], judged: list[str]) -> list[str]:
    return [f"{100 * accuracies[name]:.1f} %" for name in judged]
