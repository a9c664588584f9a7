"""A process that saves, merges and exports in forks of itself, to be killed.

``python -m tests.runtime.artifact.worker FOLDER`` loads the artifact in FOLDER once and runs jobs (`tests.kit.forks`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graftc
from graftc.runtime.export.module import ExportModule
from tests.kit.forks import serve


def jobs(folder: Path) -> dict[str, Callable[[], object]]:
    """Return the jobs by name.

    Exports are prepared in advance, so that the time is that of writing and checking.
    """
    import graftc.runtime.export.onnx as onnx
    import graftc.runtime.export.pt2 as pt2

    compiled = graftc.load(folder / "artifact")
    merged = compiled.merge()
    module = ExportModule(merged._graftc, compiled.compilation.main.signature)
    onnx.LARGE = 1024  # so that the weights go into a file of their own
    prepared: dict[Any, tuple[str, tuple[int, ...]]] = {onnx: ("prepare_onnx", (23,)), pt2: ("prepare_pt2", ())}
    for exporter, (name, options) in prepared.items():
        ready = getattr(exporter, name)(module, {"graftc.note": "prepared"}, *options)
        setattr(exporter, name, lambda *args, ready=ready: ready)
    return {
        "save": lambda: compiled.save(folder / "out" / "saved"),
        "save over": lambda: compiled.save(folder / "out" / "saved", force=True),
        "merge": lambda: merged.save(folder / "out" / "merged"),
        "onnx": lambda: merged.export(folder / "out" / "m.onnx"),
        "onnx over": lambda: merged.export(folder / "out" / "m.onnx", force=True),
        "pt2": lambda: merged.export(folder / "out" / "m.pt2", format="pt2"),
    }


if __name__ == "__main__":
    serve(jobs(Path(sys.argv[1])))
