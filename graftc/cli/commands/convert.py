"""``graftc convert``: convert adaptations to LoRA, and adapter folders from one layout to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from annotated_types import Ge

from graftc.cli.command import CommandRun, command
from graftc.cli.fold_output import print_files
from graftc.cli.options import BaseOption
from graftc.records.conversion import ConvertedSite, RenamedMaps
from graftc.records.results import WrittenResult
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import counted

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.runtime.deploy.convert import Converted
    from graftc.runtime.interop.layouts.convert import ConvertedFolder


@dataclass(frozen=True, kw_only=True)
class ConvertResult(
    WrittenResult, published="ConvertResult", behind={"source": ("out", "dry_run"), "into_base": ("files", "warnings")}
):
    """`graftc convert DIR --out DIR2 --json`."""

    source: str
    """The DIR argument."""

    from_form: str
    """`artifact`, or the layout of the adapter folder."""

    to_form: str
    """`lora`, or the layout that was written."""

    rank: Annotated[int, Ge(1)]
    """The largest rank."""

    largest_error: Annotated[float, Ge(0)]
    """The worst site's error."""

    sites: tuple[ConvertedSite, ...]
    """Every site or map."""

    outputs: Mapping[str, float] | None = None
    """By output, the largest absolute difference between both models on random inputs; null for an adapter folder."""

    largest_output: float | None = None
    """The largest absolute number among these outputs; null for an adapter folder."""

    renamed: tuple[RenamedMaps, ...] = ()
    """The maps of an adapter folder that have got another model's names (`--onto`)."""

    beside: Mapping[str, Mapping[str, float]] | None = None
    """By name, for artifacts that share a base (`--beside`), the largest differences in the outputs; null otherwise."""

    into_base: tuple[str, ...] = ()
    """Names of the adaptations that were folded into a base inside of the new artifact."""


LORA, GGUF = "lora", "gguf"
_OF_ARTIFACTS = ("names", "rank", "error", "into-base", "beside")
_OF_FOLDERS = ("from", "add", "join", "split", "onto")


def _several(word: str, metavar: str, text: str) -> Any:
    return typer.Option(f"--{word}", metavar=metavar, help=f"{text}; may be repeated.", show_default=False)


@command(writes=True)
def convert(
    run: CommandRun,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="An artifact, or an adapter folder: adapter_config.json with adapter_model.safetensors.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="For an artifact: lora. For an adapter folder, a layout: peft, vllm, sglang, tinker, unsloth, "
            "torchtune; or gguf, which needs --model. Default: lora or peft.",
            show_default=False,
        ),
    ] = None,
    model: BaseOption = None,
    names: Annotated[
        list[str] | None, _several("names", "NAME", "An adaptation of the artifact to convert, instead of all")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", min=1, help="Rank of the LoRAs. Default: the rank that loses nothing."),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            "--error",
            metavar="X",
            help="Use the smallest rank at each site whose relative error (Frobenius norm) is at most X.",
            show_default=False,
        ),
    ] = None,
    into_base: Annotated[
        list[str] | None,
        _several("into-base", "NAME", "What to fold into a base stored in the new artifact: an adaptation, or trained"),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        _several(
            "beside",
            "ARTIFACT",
            "Another artifact of the same base, to serve beside the first over one base with what they share "
            "(--into-base), each as a PEFT folder",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="LAYOUT",
            help="The layout of the adapter folder. Default: as detected from its keys.",
            show_default=False,
        ),
    ] = None,
    add: Annotated[
        list[Path] | None, _several("add", "DIR2", "Another adapter folder for the same base, to add to the first")
    ] = None,
    join: Annotated[list[str] | None, _several("join", "WHAT", "Fuse maps into one: qkv or gate_up")] = None,
    split: Annotated[list[str] | None, _several("split", "WHAT", "Split fused maps: qkv or gate_up")] = None,
    onto: Annotated[
        Path | None,
        typer.Option(
            "--onto",
            metavar="MODEL",
            help="Give an adapter folder the names of another model that contains the same maps: the vision-language "
            "model around its base, or the language model alone.",
            show_default=False,
        ),
    ] = None,
) -> ConvertResult:
    """Convert an artifact's adaptations to LoRA, or an adapter folder to another layout, and measure the difference."""
    from graftc.runtime.artifact.places import is_peft

    given: dict[str, Any] = {"names": names, "rank": rank, "error": error, "into-base": into_base, "beside": beside}
    given |= {"from": source, "add": add, "join": join, "split": split, "onto": onto}
    if is_peft(directory):
        _require_none(given, _OF_ARTIFACTS, "an adapter folder")
        run.step("converting")
        folder = _folder(run, directory, to, model, given)
        return ConvertResult(
            source=str(directory),
            from_form=folder.source,
            to_form=folder.target,
            rank=folder.rank,
            largest_error=folder.largest_error,
            sites=folder.sites,
            renamed=folder.renamed,
        )
    _require_none(given, _OF_FOLDERS, "an artifact")
    _require_lora(to)
    if beside:
        _require_none(given, ("names", "rank", "error"), "artifacts that share a base")
        return _shared(run, [directory, *beside], model, into_base or ["trained"])
    wanted = {"names": names, "rank": rank, "error": error, "into_base": into_base or ()}
    converted = _artifact(run, directory, model, wanted)
    return ConvertResult(
        source=str(directory),
        from_form="artifact",
        to_form=LORA,
        rank=max(site.rank or 0 for site in converted.sites),
        largest_error=converted.largest_error,
        sites=converted.sites,
        outputs=dict(converted.outputs),
        largest_output=converted.largest_output,
        into_base=() if converted.partial is None else tuple(converted.partial.folded),
    )


@convert.shows
def _show(result: ConvertResult, to: Console) -> None:
    lines = {
        "converted:": f"{result.from_form} to {result.to_form}, {counted(len(result.sites))}, "
        f"rank {result.rank} at most",
        "largest error:": f"{result.largest_error:.1e} of a site's update",
    }
    if result.outputs is not None:
        largest = max(result.outputs.values(), default=0.0)
        lines["outputs:"] = f"within {largest:.1e} of the original's, whose largest is {result.largest_output:.1e}"
    for own in result.renamed:
        lines[f"{own.old or '(front)'}:"] = f"{own.new or '(nothing)'}, {counted(own.maps, 'map')}, by {own.proof}"
    for name, outputs in (result.beside or {}).items():
        lines[f"{name}:"] = f"outputs within {max(outputs.values(), default=0.0):.1e}"
    if result.into_base:
        lines["folded into a base:"] = ", ".join(result.into_base)
    for word, text in lines.items():
        to.print(f"{word:<22}{text}", soft_wrap=True, markup=False)
    worst = sorted(result.sites, key=lambda site: -site.error)[:3] if result.largest_error > 1e-6 else []
    for site in worst:
        ranks = "" if site.rank is None else f", rank {site.rank} of {site.full_rank}"
        to.print(f"{'':<22}{site.site}: {site.error:.1e}{ranks}", soft_wrap=True, markup=False)
    print_files(result.out, result.files, to)


def _require_none(given: dict[str, Any], words: tuple[str, ...], what: str) -> None:
    for word in words:
        if given[word] is not None:
            raise GraftError("GC090", f"--{word} does not apply to {what}", hint="see graftc convert --help")


def _folder(
    run: CommandRun, directory: Path, to: str | None, model: str | None, given: Mapping[str, Any]
) -> ConvertedFolder:
    from graftc.runtime.interop.layouts.convert import AdapterSource, convert_folder

    base, join, apart = None if model is None else Path(model), given["join"] or (), given["split"] or ()
    if to == LORA:
        raise GraftError(
            "GC090", "an adapter folder can be converted only to another layout", hint="for example --to vllm"
        )
    if to == GGUF and (join or apart or given["onto"]):
        message = "--join, --split and --onto do not apply to GGUF, which has the base's maps"
        raise GraftError("GC090", message, hint="leave them out")
    origin = AdapterSource.of(directory, given["from"], given["add"] or (), base)
    if to == GGUF:
        from graftc.runtime.export.gguf.convert import convert_to_gguf

        return convert_to_gguf(origin, run.out, base, force=run.force)
    return convert_folder(origin, run.out, to or "peft", join=join, apart=apart, onto=given["onto"], force=run.force)


def _shared(run: CommandRun, folders: list[Path], model: str | None, into_base: list[str]) -> ConvertResult:
    from graftc.runtime.api import load
    from graftc.runtime.deploy.shared_base import is_shared, share_base

    names = [folder.resolve().name for folder in folders]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise GraftError("GC005", f"two artifacts are named {double!r}", hint="rename one of the folders")
    run.require_destination(*folders, model, replaceable=is_shared)
    run.step("loading")
    models = {name: load(folder, model) for name, folder in zip(names, folders, strict=True)}
    run.step("converting")
    made = share_base(models, into_base)
    if run.out is not None:
        run.step("writing")
        made.save(run.out, force=run.force)
    sites = tuple(site for converted in made.adapters.values() for site in converted.sites)
    return ConvertResult(
        source=str(folders[0]),
        from_form="artifact",
        to_form=LORA,
        rank=max(made.ranks.values()),
        largest_error=max((site.error for site in sites), default=0.0),
        sites=sites,
        outputs=dict(made.adapters[names[0]].outputs),
        largest_output=made.adapters[names[0]].largest_output,
        beside={name: dict(converted.outputs) for name, converted in made.adapters.items()},
        into_base=tuple(into_base),
    )


def _require_lora(to: str | None) -> None:
    if to not in (None, LORA):
        hint = "write an adapter folder with graftc export --format peft, and convert that"
        raise GraftError("GC090", f"an artifact cannot be converted to {to!r}", hint=hint)


def _artifact(run: CommandRun, directory: Path, model: str | None, wanted: Mapping[str, Any]) -> Converted:
    from graftc.runtime.api import load
    from graftc.runtime.artifact.places import is_ours
    from graftc.runtime.model.runner import runner_of

    run.require_destination(directory, model, replaceable=is_ours)
    run.step("loading")
    compiled = load(directory, model)
    run.step("converting")
    converted: Converted = runner_of(compiled).convert(**wanted)
    if run.out is not None:
        run.step("writing")
        converted.save(run.out, force=run.force)
    return converted
