"""Export models as GGUF: a whole merged model, or the LoRAs of a compiled one."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from graftc.compiler.capture.interface import config_of
from graftc.runtime.artifact.write import require_values
from graftc.runtime.export.formats.gguf import FileType
from graftc.runtime.export.gguf.adapter import adapter_file, plain_of
from graftc.runtime.export.gguf.model import merged_file
from graftc.runtime.export.gguf.writing import GgufFile
from graftc.runtime.export.job import ExportJob
from graftc.runtime.interop.transformers import FoldedModel
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.serving.engines import Engine, engine_of
from graftc.runtime.serving.limits import gguf_problems
from graftc.specs.errors.diagnostics import GraftError, warn


def prepare(job: ExportJob) -> GgufFile:
    """Return the content of the file.

    Raises:
        GraftError: GC053 for a model without values, GC066 for anything that is not plain LoRA, GC068 for an engine
            that does not load the file; others as in `merged_file` and `adapter_file`.
    """
    if not isinstance(job.runner, AdaptedRunner):
        content = merged_file(cast(FoldedModel, job.runner))
        _require_read(job, content)
        return content
    if job.options["server"] is not None:
        engine_of(job.options["server"].name, "gguf-adapter")
    require_values(job.runner)
    adapter = plain_of(cast(AdaptedRunner, job.simplest).compilation)
    return adapter_file(adapter, config_of(job.runner.compilation.source))


def write(job: ExportJob, path: Path) -> None:
    """Write the file. Raises: as in `GgufFile.write`."""
    lacking = job.prepared.write(path, file_type_of(job))
    if lacking is not None:
        hint = "llama.cpp needs one: save it with the base as tokenizer.json, or add it with llama.cpp's own tools"
        warn("GC075", f"{job.path} has no tokenizer: {lacking}", hint=hint)


def check(job: ExportJob, path: Path) -> None:
    """Check that reading the file yields what was written.

    Raises:
        GraftError: GC060 if it does not.
    """
    job.prepared.check(path, file_type_of(job))


def file_type_of(job: ExportJob) -> FileType:
    """Return the type of a file's matrices: the given one, or the one that the engine reads, or float32."""
    engine: Engine | None = job.options["server"]
    usual = engine.file_types[0].lower() if engine is not None and engine.file_types else "f32"
    return cast(FileType, job.options["dtype"] or usual)


def _require_read(job: ExportJob, content: GgufFile) -> None:
    """Raise if the engine that a whole model is for does not read the file.

    Raises:
        GraftError: GC068.
    """
    engine: Engine | None = job.options["server"]
    if engine is None:
        return
    names = [entry.name for entry in content.entries]
    problems = [str(p) for p in gguf_problems(engine, content.arch, [file_type_of(job).upper()], names)]
    if problems:
        raise GraftError("GC068", f"{engine.name} cannot load the model: {problems[0]}", details=problems[1:])
