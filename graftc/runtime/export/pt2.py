"""``.pt2``: torch's own serialised program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from graftc.runtime.export import reason
from graftc.runtime.export.module import ExportModule
from graftc.specs.diagnostics import GraftError


def write_pt2(module: ExportModule, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a ``.pt2`` archive; spec, fingerprint and certificate are extra files in it.

    Load it with ``torch.export.load``, which runs code from the file: only load what you trust.

    Raises:
        GraftError: GC060 when torch cannot export or save the program.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                module, (), dict(module.inputs), strict=False, dynamic_shapes=module.dynamic_shapes()
            )
            torch.export.save(program, path, extra_files=dict(metadata))
    except Exception as error:
        raise GraftError("GC060", f"torch.export failed: {reason(error)}") from error
