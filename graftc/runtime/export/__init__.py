"""Exports: ONNX and ``.pt2``, each checked after writing and renamed into place when it is complete."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graftc.compiler.fingerprint import fingerprint
from graftc.specs.diagnostics import GraftError
from graftc.specs.io import dump_spec

if TYPE_CHECKING:
    from graftc.compiler.family import Family
    from graftc.runtime.compiled import ModelRunner

Format = Literal["onnx", "pt2"]


def export_model(runner: ModelRunner, path: Path, format: Format, family: Family) -> Path:
    """Export a compiled or merged model.

    Args:
        runner: what to export, in eval mode.
        path: the file to write; nothing is there until it is complete and checked.
        format: ``"onnx"`` (weights in ``<name>.data`` beside it where they are large) or ``"pt2"``.
        family: the signature to export.

    Raises:
        GraftError: GC060 when exporting or checking fails, GC061 when a package is missing, GC063 when ``path``
            exists.
    """
    if format not in ("onnx", "pt2"):
        raise GraftError("GC060", f"format {format!r} is unknown", hint="the formats are onnx and pt2")
    for taken in (path, path.with_name(f"{path.name}.data")):
        if taken.exists():
            raise GraftError("GC063", f"{taken} exists", hint="choose another path or remove it")
    from graftc.runtime.export.module import ExportModule

    if format == "onnx":
        from graftc.runtime.export.onnx import write_onnx as write
    else:
        from graftc.runtime.export.pt2 import write_pt2 as write
    with _staged(path) as staged:
        write(ExportModule(runner, family), staged, metadata(runner))
    return path


def metadata(runner: ModelRunner) -> dict[str, str]:
    """What an exported file says of itself: spec, base fingerprint, certificate."""
    compilation = runner._compilation
    certificate = getattr(runner, "certificate", None)
    found = {
        "graftc.spec": dump_spec(compilation.spec),
        "graftc.fingerprint": fingerprint(compilation.store, getattr(runner, "config", None)),
    }
    if certificate is not None:
        found["graftc.certificate"] = json.dumps(certificate.to_json(), sort_keys=True)
    return found


@contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside ``path``; what was written there is moved at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield folder / path.name
        # The file that names the others comes last, so that it never points at something missing.
        for file in sorted(folder.iterdir(), key=lambda f: f.name == path.name):
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reason(error: BaseException) -> str:
    """The first line of an exporter's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


__all__ = ["export_model", "metadata", "reason"]
