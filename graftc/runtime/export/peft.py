"""Export adaptations as a PEFT folder, within the limits of a server if one is named."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graftc.runtime.artifact.write import require_values
from graftc.runtime.export.job import AdapterSummary, ExportJob
from graftc.runtime.interop.peft.exporting import PeftExport, check_peft, prepared, write_peft
from graftc.runtime.interop.peft.plain import plain, subtracts_unknown_start
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.serving.engines import Engine
from graftc.runtime.serving.limits import require_served
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True, kw_only=True)
class PreparedFolder(AdapterSummary):
    """A PEFT folder before it is written."""

    content: PeftExport


def prepare(job: ExportJob) -> PreparedFolder:
    """Return the folder's contents.

    Raises:
        GraftError: GC053 for a model without values, GC068 for anything that the server does not accept, GC073 for a
            maximum rank without a server, GC115 for anything that PEFT cannot express, or for a merged model.
    """
    if not isinstance(job.runner, AdaptedRunner):
        raise GraftError("GC115", "a merged model has no adaptation", hint="export the compiled model it was made from")
    server: Engine | None = job.options["server"]
    rank, largest = None, job.options["max_rank"]
    if largest is not None and server is None:
        raise GraftError("GC073", "max_rank is a server's limit", hint='name the server: server="vllm"')
    require_values(job.runner)
    compilation = job.simplest.compilation
    content = prepared(compilation)
    if server is not None and (tokens := content.config.get("alora_invocation_tokens")):
        message = f"{server.name} would apply the adapter to every token, not from {list(tokens)} on"
        hint = "export it with format gguf, for llama.cpp's server, or leave the server out"
        raise GraftError("GC068", message, hint=hint)
    if server is not None or subtracts_unknown_start(content, compilation):
        content = plain(content, compilation)
    if server is not None:
        rank = require_served(server, content.config, content.tensors, max_rank=largest)
    needs = server.option_for(rank) if server is not None else None
    title = str(content.config["peft_type"])
    return PreparedFolder(content=content, title=title, tensors=content.sites(), max_rank=rank, needs=needs)


def write(job: ExportJob, folder: Path) -> None:
    """Create the folder."""
    write_peft(job.prepared.content, folder)


def check(job: ExportJob, folder: Path) -> None:
    """Check that reading the folder yields what was written.

    Raises:
        GraftError: GC060 if it does not.
    """
    check_peft(job.prepared.content, folder)
