"""The arguments and options that several commands share, each with a single name and help text."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from enum import EnumType, StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from graftc.cli import completion
from graftc.specs.errors.diagnostics import GraftError

_MODEL_HELP = (
    "A transformers folder, a hub id, or package.module:callable; the callable returns the model, or (model, "
    "example_inputs) if graftc cannot infer its inputs: tensors by name, or in the order of forward's parameters."
)


class _Installed(EnumType):
    """Metaclass of `ExportFormat`, whose members are read from the table of formats whenever they are listed."""

    def __iter__(cls) -> Iterator[Any]:
        from graftc.runtime.export.registry import formats

        return iter(StrEnum("ExportFormat", [(name, name) for name in formats()]))

    def __call__(cls, member: Any) -> Any:  # type: ignore[override]
        return member


class ExportFormat(StrEnum, metaclass=_Installed):
    """The formats that ``graftc export`` can write."""


class DType(StrEnum):
    """The dtypes that a merged model can have instead of its base's own."""

    FLOAT32 = "float32"


class BaseChoice(StrEnum):
    """The form in which a merge stores the weights of a quantised base."""

    FULL = "full"
    REQUANTIZED = "requantized"


AllowUnchanged: TypeAlias = Annotated[
    bool, typer.Option("--allow-unchanged", help="Accept a fold that changes no tensor of the base.")
]
Certify: TypeAlias = Annotated[
    bool,
    typer.Option("--certify/--no-certify", help="Fold the adaptations, and store the certificate in the artifact."),
]


def folder_argument(help: str) -> Any:
    """Return the argument DIR of a command, with a text that says which folders it takes."""
    return typer.Argument(metavar="DIR", help=help, show_default=False, autocompletion=completion.artifacts)


ArtifactArgument: TypeAlias = Annotated[Path, folder_argument("An artifact: a folder that graftc compile wrote.")]
SealedArgument: TypeAlias = Annotated[
    Path, folder_argument("An artifact, or the folder of a merged model with its graftc.json.")
]
BaseOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="The base, if it is not the one that the artifact names. " + _MODEL_HELP,
        show_default=False,
        autocompletion=completion.models,
    ),
]
Budget: TypeAlias = Annotated[
    float | None,
    typer.Option(
        "--budget",
        metavar="X",
        min=0,
        help="Largest allowed absolute difference between outputs. Default: the spec's, or a bound that depends on the "
        "dtype.",
        show_default=False,
    ),
]
DTypeOption: TypeAlias = Annotated[
    DType | None,
    typer.Option(
        "--dtype",
        help="Widen a 16-bit base first, so that rounding does not reduce the update. Default: the base's dtype.",
        show_default=False,
    ),
]
BaseFormOption: TypeAlias = Annotated[
    BaseChoice | None,
    typer.Option(
        "--base",
        help="The form of a quantised base's weights: all in full precision, or those that change packed again, which "
        "exports can store but model folders cannot.",
        show_default=False,
    ),
]
DryRun: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Do everything except writing.")]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Overwrite --out if it exists.")]
FormatOption: TypeAlias = Annotated[
    ExportFormat,
    typer.Option("--format", "-f", help="What to write.", show_default=False, autocompletion=completion.formats),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout, including errors.")]
Meta: TypeAlias = Annotated[
    bool, typer.Option("--meta", help="Build the model without weights; a folder needs only its config.json.")
]
ModelArgument: TypeAlias = Annotated[
    str,
    typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False, autocompletion=completion.models),
]
ModelOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model", "-m", metavar="MODEL", help=_MODEL_HELP, show_default=False, autocompletion=completion.models
    ),
]
Out: TypeAlias = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="PATH", help="Where to write; not needed with --dry-run.", show_default=False),
]
Seed: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        show_default=False,
        help="Seed for the adapters' initial values, recorded in the artifact. Default: torch's own seed.",
    ),
]
SpecArgument: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="SPEC",
        help="A spec: a .yaml, .json or .toml file.",
        show_default=False,
        autocompletion=completion.specs,
    ),
]


def require_packed(base: BaseChoice | None, packed: Collection[str]) -> None:
    """Check that ``--base`` has an effect.

    Raises:
        GraftError: GC090 if no weight of the base is packed.
    """
    if base is not None and not packed:
        message = "--base decides what happens to packed weights, but the base has none"
        raise GraftError("GC090", message, hint="leave out --base")


def destination(out: Path | None, *, dry_run: bool) -> Path | None:
    """Return the path to write to; None with ``--dry-run``.

    Raises:
        GraftError: GC090 if ``--out`` is missing.
    """
    if dry_run:
        return None
    if out is None:
        raise GraftError("GC090", "missing option '--out'", hint="use --out PATH, or --dry-run to write nothing")
    return out
