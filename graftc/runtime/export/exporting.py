"""Export of a compiled or merged model in any format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.capture.isolation import isolated
from graftc.runtime.export.exporters import EXPORTERS, ExportJob, ReadyExport
from graftc.runtime.export.writing import UNFOLDED, FoldEvidence
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.sharded import written_once
from graftc.runtime.progress import during
from graftc.specs.errors.arguments import as_path
from graftc.specs.options.exports import FileType, options_for


class Exporting:
    """The operation that exports a model.

    Args:
        runner: the Runner of the model.
    """

    evidence: FoldEvidence = UNFOLDED

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    @isolated()
    @during("exporting")
    @written_once
    def export(
        self,
        path: str | Path,
        format: Literal["onnx", "onnx-generate", "pt2", "peft", "gguf"] = "onnx",
        example_inputs: ExampleInputs | None = None,
        *,
        inputs: str | Sequence[str] = (),
        dtype: FileType | None = None,
        server: Literal["vllm", "sglang", "mistralrs"] | None = None,
        max_rank: int | None = None,
        force: bool = False,
    ) -> Path:
        """Export the model in eval mode; a merged one is exported folded, with its certificate in the metadata.

        Arguments and errors are those of `Compiled.export`.
        """
        to, given = as_path(path), {"example_inputs": example_inputs, "inputs": inputs, "dtype": dtype}
        ready_export(self, format, {**given, "server": server, "max_rank": max_rank}).write(to, force)
        return to


class ExportingFolded(Exporting):
    """The operation that exports a model in which adaptations have been folded.

    Args:
        runner: the Runner of the model.
        evidence: the evidence of the fold to put into the files.
    """

    def __init__(self, runner: ModelRunner, evidence: FoldEvidence) -> None:
        super().__init__(runner)
        self.evidence = evidence


def ready_export(exporting: Exporting, format: str, given: Mapping[str, Any]) -> ReadyExport:
    """Prepare an export of every adaptation, including disabled ones; it is still to be written.

    Args:
        exporting: the export operation of the model.
        format: one of the formats in `graftc.specs.options.exports`.
        given: options of the format, by name.

    Raises:
        GraftError: for an option or a model that the format does not take.
    """
    options, runner = options_for(format, given), exporting.runner.complete()
    return EXPORTERS[format].prepare(ExportJob(runner, options, exporting.evidence))
