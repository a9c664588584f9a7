"""``.pt2``: torch's own serialised program."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from graftc.runtime.export import reason
from graftc.runtime.export.module import ExportModule
from graftc.specs.diagnostics import GraftError


def prepare_pt2(module: ExportModule, metadata: Mapping[str, str]) -> Callable[[Path], None]:
    """Export to a ``.pt2`` archive; spec, fingerprint and certificate are extra files in it.

    Load it with ``torch.export.load``, which runs code from the file: only load what you trust.

    Returns:
        What writes the archive to a path.

    Raises:
        GraftError: GC060 when torch cannot export the program.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module, (), dict(module.inputs), strict=False, dynamic_shapes=module.dynamic_shapes()
            )
    except Exception as error:
        raise GraftError("GC060", f"torch.export failed: {reason(error)}") from error

    def write(path: Path) -> None:
        with warnings.catch_warnings(), _Enduring(path) as file:
            warnings.simplefilter("ignore")
            torch.export.save(program, file, extra_files=dict(metadata))

    return write


class _Enduring(io.FileIO):
    """A file that keeps its first error for the end: torch's writer ends the process when a write fails."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of ``data``, or nothing more once the system has refused some."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self._error is None and rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._error = error
        return size

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        if self._error is not None:
            raise self._error
