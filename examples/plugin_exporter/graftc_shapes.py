"""An export format of a plugin: the shapes of all tensors, as text."""

from __future__ import annotations

from pathlib import Path

from graftc.extend import Exporter, ExportJob, ExportOption, GraftError


def lines(job: ExportJob) -> list[str]:
    """Return a line for each tensor: its name and its sizes."""
    every = [" ".join([name, *map(str, tensor.shape)]) for name, tensor in job.tensors()]
    return sorted(every) if job.options["order"] == "name" else every


def write(job: ExportJob, path: Path) -> None:
    """Write the lines to a file."""
    path.write_text("\n".join(lines(job)) + "\n", encoding="utf-8")


def check(job: ExportJob, path: Path) -> None:
    """Read the file back."""
    if path.read_text(encoding="utf-8").splitlines() != lines(job):
        raise GraftError("GC060", f"{path.name} cannot be read back unchanged")


ORDER = ExportOption("order", "Order of the lines", ("model", "name"), default="model")
SHAPES = Exporter("shapes", "The shapes of all tensors, as text", (ORDER,), write, check)
