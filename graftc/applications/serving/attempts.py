"""Try a route: make its files in a temporary folder, and check them as `graftc serve-check` does."""

from __future__ import annotations

import shlex
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from graftc.applications.serving.checking import serve_check
from graftc.records.serving.certificates import ServingCertificate
from graftc.records.serving.plans import RouteKind, ServingRoute
from graftc.runtime.export.exporting import Exporting, ready_export
from graftc.runtime.export.registry import exporter_of
from graftc.runtime.interop.layouts.convert import AdapterSource, convert_folder
from graftc.runtime.interop.peft.folder import WEIGHTS, adapter_tensors
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.serving.engines import Engine
from graftc.specs.errors.diagnostics import GraftError, GraftWarning

PLAIN = "vllm"
"""The engine that reads most of what a plain LoRA can have: an export for it is the start of a conversion."""


@dataclass(frozen=True)
class Made:
    """Files of a route.

    Attributes:
        path: the file or folder that the engine loads.
        out: the same as the commands make it.
        commands: the commands that make it.
    """

    path: Path
    out: str
    commands: tuple[str, ...]


def tried(route: ServingRoute, engine: Engine, base: Path, make: Callable[[Path], Made]) -> ServingRoute:
    """Return a route with what became of it.

    Args:
        route: the route as planned, not available.
        engine: the engine.
        base: the folder of the base, of which a config is enough.
        make: a function that makes the route's files in an empty folder.
    """
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftWarning)
        try:
            made = make(Path(place))
            certificate = serve_check(made.path, engine.name, base=base)
        except GraftError as error:
            return replace(route, reason=error.message)
        size = sum(file.stat().st_size for file in made.path.rglob("*")) or made.path.stat().st_size
        return replace(
            route,
            available=certificate.passed,
            reason="" if certificate.passed else _reasons(certificate),
            rank=_rank(made.path, certificate),
            bytes=size if certificate.passed else None,
            commands=made.commands if certificate.passed else (),
            served=made.out if certificate.passed else None,
            needs=certificate.needs if certificate.passed else None,
        )


def _reasons(certificate: ServingCertificate) -> str:
    return "; ".join(dict.fromkeys(problem.reason for problem in certificate.problems))


def _rank(path: Path, certificate: ServingCertificate) -> int | None:
    if certificate.sites:
        return max(site.rank for site in certificate.sites)
    if certificate.form != "peft":
        return None
    factors = (stored.shape for key, stored in adapter_tensors(path / WEIGHTS).entries.items() if ".lora_A." in key)
    return max((shape[0] for shape in factors if shape), default=None)


def planned(kind: RouteKind, engine: Engine, *, exact: bool = True, reason: str = "") -> ServingRoute:
    """Return a route that has not been tried."""
    return ServingRoute(kind, engine.name, False, exact, kind not in ("merged", "lora-over-base"), reason)


def adapter_files(runner: AdaptedRunner, source: str, engine: Engine) -> Callable[[Path], Made]:
    """Return a function that makes what an engine loads of a model's adapters.

    Args:
        runner: the model.
        source: the artifact that the commands read.
        engine: an engine that loads adapters, as PEFT folders or in GGUF.
    """

    def make(place: Path) -> Made:
        out = f"{source}-{engine.name}"
        if "peft" not in engine.forms:
            file, options = place / "adapter.gguf", ("--no-merge", "--format", "gguf")
            exported(Exporting(runner), "gguf", file)
            return Made(file, f"{out}.gguf", (command("export", source, *options, "--out", f"{out}.gguf"),))
        folder = place / "peft"

        def exporting_for(server: str) -> str:
            return command("export", source, "--format", "peft", "--for", server, "--out", f"{source}-{server}")

        try:
            exported(Exporting(runner), "peft", folder, server=engine.name)
            return Made(folder, out, (exporting_for(engine.name),))
        except GraftError as error:
            if error.code != "GC068" or engine.layout is None:
                raise
            try:
                exported(Exporting(runner), "peft", folder, server=PLAIN)
            except GraftError:
                raise error from None
        convert_folder(AdapterSource.of(folder), place / "laid-out", engine.layout)
        lay_out = command("convert", f"{source}-{PLAIN}", "--to", engine.layout, "--out", out)
        return Made(place / "laid-out", out, (exporting_for(PLAIN), lay_out))

    return make


def command(name: str, *words: str) -> str:
    """Return a command line of graftc, quoted for a shell; paths in it come from `path_word`."""
    return shlex.join(["graftc", name, *words])


def path_word(path: Path) -> str:
    """Return a path as a word of a command, which is not taken for an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def exported(exporting: Exporting, format: str, path: Path, **options: Any) -> Mapping[str, Any]:
    """Export a model to a path, with the options of the format."""
    ready_export(exporting, exporter_of(format), options, path).write(force=False)
    return options
