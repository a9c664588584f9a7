"""Export to ``.pt2``, torch's format for serialised programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from graftc.compiler.capture.as_captured import keeps_name
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.folding.differences import largest_difference
from graftc.compiler.quiet import quiet
from graftc.files.disk_space import require_disk_space
from graftc.runtime.export.graphs import beside, write_inputs
from graftc.runtime.export.job import ExportJob
from graftc.runtime.export.module import ExportModule
from graftc.specs.errors.diagnostics import GraftError, first_line


def prepare(job: ExportJob) -> Callable[[Path], None]:
    """Return a function that writes a model's graph to a path.

    Raises:
        GraftError: as in `ExportJob.graph` and `prepare_pt2`.
    """
    module = job.graph()
    return prepare_pt2(module, job.metadata(module))


def write(job: ExportJob, path: Path) -> None:
    """Write a model's graph and, beside it, the tensors of adaptations that are inputs."""
    job.prepared(path)
    write_inputs(job, [job.graph()], beside(job, path))


def prepare_pt2(module: ExportModule, metadata: Mapping[str, str]) -> Callable[[Path], None]:
    """Export to a ``.pt2`` archive that contains the spec, fingerprint and certificate as extra files.

    Load it with ``torch.export.load``, which runs code from the file: only load what you trust.

    Returns:
        A function that writes the archive to a path.

    Raises:
        GraftError: GC060 if torch cannot export the program.
    """
    try:
        with exclusive(), quiet(["torch"]), torch.no_grad():
            program = torch.export.export(
                module.module, (), dict(module.inputs), strict=False, dynamic_shapes=module.dynamic_shapes()
            )
    except Exception as error:
        raise GraftError("GC060", f"torch.export failed: {first_line(error)}") from error
    _require_names(module, program)

    def write(path: Path) -> None:
        weights = sum(t.numel() * t.element_size() for t in module.module.state_dict().values())
        # torch's writer terminates the process when the disk is full.
        require_disk_space(path, int(1.05 * weights) + 4096 * len(module.program.graph.nodes) + 2**20)
        with exclusive(), quiet(["torch"]):
            torch.export.save(program, path, extra_files=dict(metadata))

    return write


def _require_names(module: ExportModule, program: torch.export.ExportedProgram) -> None:
    """Check that the model's input names have the same meaning in the file as in the model.

    In the file, torch converts the names to lower case, in generated code in which some names are already in use.

    Raises:
        GraftError: GC060 if a call with these names fails or returns different values.
    """
    changed = [axis.name for axis in module.axes if not keeps_name(axis.name)]
    if not changed:
        return
    try:
        with torch.no_grad():
            actual, expected = program.module()(**module.inputs), module.module(**module.inputs)
        differs = any(largest_difference(actual[name], expected[name]) > 0 for name in module.outputs)
    except Exception:  # a name may have any meaning in code that torch generates
        differs = True
    if differs:
        message = f"a .pt2 cannot have inputs named {', '.join(axis.name for axis in module.axes)}"
        hint = f"export to ONNX, or rename the argument {changed[0]} of forward"
        raise GraftError("GC060", message, hint=hint)
