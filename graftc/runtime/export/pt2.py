"""``.pt2``: torch's own serialised program."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.quiet import quiet
from graftc.runtime.export.module import ExportModule
from graftc.specs.errors.diagnostics import GraftError, first_line


def prepare_pt2(module: ExportModule, metadata: Mapping[str, str]) -> Callable[[Path], None]:
    """Export to a ``.pt2`` archive; spec, fingerprint and certificate are extra files in it.

    Load it with ``torch.export.load``, which runs code from the file: only load what you trust.

    Returns:
        What writes the archive to a path.

    Raises:
        GraftError: GC060 when torch cannot export the program.
    """
    try:
        with exclusive(), quiet(["torch"]), torch.no_grad():
            program = torch.export.export(
                module.module, (), dict(module.inputs), strict=False, dynamic_shapes=module.dynamic_shapes()
            )
    except Exception as error:
        raise GraftError("GC060", f"torch.export failed: {first_line(error)}") from error

    def write(path: Path) -> None:
        _reserve(path, module)
        with exclusive(), quiet(["torch"]):
            torch.export.save(program, path, extra_files=dict(metadata))

    return write


def _reserve(path: Path, module: ExportModule) -> None:
    """See that there is room: torch's writer ends the process when a disk is full.

    Raises:
        OSError: there is none.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    weights = sum(t.numel() * t.element_size() for t in module.module.state_dict().values())
    room = int(1.05 * weights) + 4096 * len(module.program.graph.nodes) + 2**20
    probe = path.with_name(f"{path.name}.room")
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, room)
    finally:
        probe.unlink(missing_ok=True)
