"""The argument of an exporter's functions: a model to export, with the format's options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftc.compiler.folding.collapse import collapsed_spec, collapsed_values, collapsing
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.passes.core.ir.program_key import Signature
from graftc.records.files import PeftTensor
from graftc.runtime.export.exchange import Exchange
from graftc.runtime.export.exported_signature import exported_signature
from graftc.runtime.export.inputs import require_read
from graftc.runtime.export.metadata import UNFOLDED, FoldEvidence, metadata
from graftc.runtime.export.module import ExportModule
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True, kw_only=True)
class AdapterSummary:
    """A summary of an export of adapters alone, known before it is written; `Exporter.prepare` may return one.

    Attributes:
        title: a readable name for the kind of adapters; empty for graphs and models.
        tensors: the key of each tensor in the file, with its site, part and name in the model.
        max_rank: the maximum rank with which the server has to be started; None if it does not matter.
        needs: the server option that sets this rank, with its value; None if there is none.
    """

    title: str = ""
    tensors: Sequence[PeftTensor] = ()
    max_rank: int | None = None
    needs: str | None = None


@dataclass(eq=False)
class ExportJob:
    """A model to export, with the options of the format.

    Attributes:
        runner: the Runner of a compiled or merged model.
        options: the format's options, with defaults for those that are not given.
        evidence: the evidence for a fold, to include in the files: ``certificate`` and ``folded``, the names of
            adaptations that were folded into the weights.
        path: the export's destination; None if it is not written.
        prepared: the result of the exporter's `prepare`; ``write`` may replace it with data that ``check`` needs.
    """

    runner: ModelRunner
    options: Mapping[str, Any] = field(default_factory=dict)
    evidence: FoldEvidence = UNFOLDED
    path: Path | None = None
    prepared: Any = None
    _graphs: dict[bool, ExportModule] = field(default_factory=dict, init=False, repr=False)

    @property
    def model(self) -> nn.Module:
        """The model: a `graftc.Compiled` or a `graftc.Merged`."""
        return self.runner.module

    @cached_property
    def simplest(self) -> ModelRunner:
        """The Runner of the model that is written, with adaptations in their simplest form."""
        return deployed(self.runner) if isinstance(self.runner, AdaptedRunner) else self.runner

    @cached_property
    def exchange(self) -> Exchange | None:
        """The adaptations in the option ``inputs``; None without that option.

        Raises:
            GraftError: GC091 for an unknown adaptation, GC149 for a model that is not one graph.
        """
        require_one_graph(self.runner)
        names = self.options.get("inputs")
        return Exchange(self.simplest, names) if names else None

    @property
    def served(self) -> ModelRunner:
        """The Runner whose graphs are written: `simplest`, or with adaptations as inputs the Runner of `exchange`."""
        return self.exchange.runner if self.exchange else self.simplest

    @cached_property
    def signature(self) -> Signature:
        """The exported graph's signature: that of the option ``example_inputs``, or of the first call.

        Raises:
            GraftError: GC031 for example inputs that have no graph, GC149 for a model that is not one graph.
        """
        return exported_signature(self.served, self.options.get("example_inputs"))

    def graph(self, *, apart: bool = False) -> ExportModule:
        """Return the model's graph in eval mode as a plain module, which is created once.

        The tensors of adaptations in the option ``inputs`` become its inputs.

        Args:
            apart: whether packed weights are inputs as well, as described in `ExportModule`.

        Raises:
            GraftError: as in `signature`; GC065 for an adaptation in ``inputs`` that the graph does not read, GC091 for
                an unknown one.
        """
        if apart not in self._graphs:
            module = ExportModule(self.served, self.signature, self.exchange, apart=apart)
            self.require_read(module)
            self._graphs[apart] = module
        return self._graphs[apart]

    def require_read(self, *modules: ExportModule) -> None:
        """Raise unless the graphs read tensors of all adaptations in the option ``inputs``.

        Raises:
            GraftError: GC065.
        """
        require_read(self.runner, (module.program for module in modules), self.options.get("inputs") or ())

    def metadata(self, module: ExportModule) -> dict[str, str]:
        """Return the metadata for a file that contains a graph: spec, fingerprint, certificate and adapted places."""
        return metadata(self.simplest, module.program, self.evidence, self.exchange)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the model's tensors by name: first the base's, folded if the model is, then the adaptations'.

        Tied tensors occur once, and packed ones have their full values. Each tensor is a copy.
        """
        store = self.simplest.store
        for name, _ in [*store.weights(), *store.adapters()]:
            if name not in store.constants:
                value = store.full(name)  # of a packed tensor, a new one
                yield name, value if name in store.packed else value.clone()


def require_one_graph(runner: ModelRunner) -> None:
    """Raise for a model that runs its own Python between graphs.

    Raises:
        GraftError: GC149.
    """
    if runner.live is not None:
        message = f"{type(runner.compilation.source).__name__} runs its own Python between graphs of its layers"
        hint = "save the merged model, or what to_transformers() returns: a file of graphs cannot contain Python"
        raise GraftError("GC149", message, hint=hint)


def deployed(compiled: AdaptedRunner) -> AdaptedRunner:
    """Return the model with adaptations that collapse replaced by simpler ones; the model itself if none collapse."""
    compilation = compiled.compilation
    if not collapsing(compilation):
        return compiled
    values = dict(adapter_values(compilation.store)) | collapsed_values(compilation)
    simpler: AdaptedRunner = runner_of(compiled.sibling(collapsed_spec(compilation), values))
    return simpler
