"""Export models as GGUF: a whole merged model, or the LoRAs of a compiled one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import cast

from graftc.compiler.capture.interface import config_of
from graftc.runtime.artifact.write import require_values
from graftc.runtime.export.gguf.adapter import adapter_file, plain_of
from graftc.runtime.export.gguf.model import merged_file
from graftc.runtime.export.gguf.writing import GgufFile
from graftc.runtime.export.job import ExportJob
from graftc.runtime.interop.transformers import FoldedModel
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.specs.errors.diagnostics import warn


def prepare(job: ExportJob) -> Callable[[], GgufFile]:
    """Return a function that returns the file to write; the file is created once, on the first call.

    Raises:
        GraftError: GC053 for a model without values, GC066 for anything that is not plain LoRA.
    """
    if not isinstance(job.runner, AdaptedRunner):
        return cache(partial(merged_file, cast(FoldedModel, job.runner)))
    require_values(job.runner)
    adapter = plain_of(cast(AdaptedRunner, job.simplest).compilation)
    return cache(partial(adapter_file, adapter, config_of(job.runner.compilation.source)))


def write(job: ExportJob, path: Path) -> None:
    """Write the file; see `merged_file` and `adapter_file`.

    Raises:
        GraftError: as in these functions and in `GgufFile.write`.
    """
    lacking = job.prepared().write(path, job.options["dtype"])
    if lacking is not None:
        hint = "llama.cpp needs one: save it with the base as tokenizer.json, or add it with llama.cpp's own tools"
        warn("GC075", f"{job.path} has no tokenizer: {lacking}", hint=hint)


def check(job: ExportJob, path: Path) -> None:
    """Check that reading the file yields what was written.

    Raises:
        GraftError: GC060 if it does not.
    """
    job.prepared().check(path, job.options["dtype"])
