"""Exporting a compiled model: as a graph with its adaptations in their simplest form, or its adaptations alone."""

from __future__ import annotations

from pathlib import Path

from graftc.compiler.capture.interface import config_of
from graftc.runtime.artifact.write import require_values
from graftc.runtime.export.exporting import Exporting
from graftc.runtime.export.gguf.adapter import export_adapter, plain_of
from graftc.runtime.export.simplest import deployed
from graftc.runtime.interop.peft.exporting import export_peft, prepared
from graftc.runtime.interop.peft.plain import plain
from graftc.runtime.interop.peft.servers import require_served, server_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.model_runner import ModelRunner
from graftc.specs.options.exports import FileType


class ExportingAdapted(Exporting[AdaptedRunner]):
    """Exports a compiled model."""

    def _simplest(self) -> ModelRunner:
        """See `Exporting`. Adaptations are in their simplest form."""
        return deployed(self.runner)

    def _export_peft(self, path: Path, force: bool, server: str | None = None, max_rank: int | None = None) -> Path:
        """See `Exporting`."""
        require_values(self.runner)
        limits = None if server is None else server_of(server)
        compilation = deployed(self.runner).compilation
        made = prepared(compilation)
        if limits is not None:
            made = plain(made, compilation)
            require_served(limits, made.config, made.tensors, max_rank=max_rank)
        export_peft(made, path, force=force)
        return path

    def _export_gguf(self, path: Path, dtype: FileType, force: bool) -> Path:
        """See `Exporting`."""
        require_values(self.runner)
        adapter = plain_of(deployed(self.runner).compilation)
        return export_adapter(adapter, config_of(self.runner.compilation.source), path, dtype=dtype, force=force)
