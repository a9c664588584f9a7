"""The part of a compiled or merged model that exports it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.capture.isolation import isolated
from graftc.compiler.capture.past import require_no_cache
from graftc.compiler.pipeline import signature_for
from graftc.runtime.model.choosing import with_choices
from graftc.runtime.model.runner import ModelRunner
from graftc.runtime.model.sharded import written_once
from graftc.runtime.progress import during
from graftc.specs.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.compiler.folding.certificate import Certificate


class Exporting(ModelRunner):
    """A Runner whose Programs can be exported."""

    @isolated()
    @during("exporting")
    @written_once
    def export(
        self,
        path: str | Path,
        format: Literal["onnx", "onnx-generate", "pt2", "peft", "gguf"] = "onnx",
        example_inputs: ExampleInputs | None = None,
        *,
        inputs: Sequence[str] = (),
        dtype: Literal["f32", "f16", "bf16"] = "f32",
        server: Literal["vllm", "sglang"] | None = None,
        force: bool = False,
    ) -> Path:
        """Export the model in eval mode: a compiled one with its adapters, experts averaged, a merged one folded, with
        its certificate in the metadata. ``"peft"`` writes the adapters of a compiled model as a folder that PEFT loads.
        ``"gguf"`` writes a merged model for llama.cpp, or the LoRAs of a compiled one as an adapter for it.
        ``"onnx-generate"`` writes a folder of graphs with a cache, with which ONNX Runtime generates.

        The tensors of ``inputs`` are no constants of the graph, but inputs by their full names, so that one file serves
        every adaptation of these shapes; in ``.pt2`` they are one keyword, ``adapter_tensors``, a mapping of names to
        tensors. Their values lie beside it, in ``<file>.<adaptation>.safetensors``.

        Args:
            path: the file to write, or the folder.
            format: ``"onnx"``, ``"onnx-generate"``, ``"pt2"``, ``"peft"`` or ``"gguf"``.
            example_inputs: a call whose signature is exported, by name or in order; by default the one that the model
                was compiled with. Values of tensors do not matter.
            inputs: names of adaptations that are in the graph.
            dtype: of the matrices in a GGUF file.
            server: what a folder for PEFT has to be fit for.
            force: replace what is there.

        Raises:
            GraftError: GC031 for example inputs that have no graph, GC060 when the exporter or the check of its result
                fails, GC061 without the ``export`` extra, GC063 when ``path`` exists, GC064 when it cannot be written,
                GC065 for an input of which the graph reads nothing, GC091 for one that there is not; GC115 for what
                PEFT cannot express, before anything is written, GC066 for what is no LoRA in a GGUF adapter, and GC068
                for what the server does not take.
        """
        if format == "peft":
            return self._export_peft(as_path(path), force, server)
        if format == "gguf":
            return self._export_gguf(as_path(path), dtype, force)
        if format == "onnx-generate":
            return self._export_cached(as_path(path), getattr(self, "certificate", None), force)
        return self._export(path, format, example_inputs, inputs, getattr(self, "certificate", None), force)

    def _export(
        self,
        path: str | Path,
        format: Literal["onnx", "pt2"],
        example_inputs: ExampleInputs | None,
        inputs: Sequence[str],
        certificate: Certificate | None,
        force: bool,
    ) -> Path:
        from graftc.runtime.export import export_model

        simplest = self._deployed()
        if simplest is not self:
            return simplest._export(path, format, example_inputs, inputs, certificate, force)
        signature = self._compilation.main.signature
        if example_inputs is not None:
            examples = self._interface.examples(example_inputs)
            chosen = {n: v for n, v in examples.items() if n in self._compilation.controls}
            own = {n: v for n, v in examples.items() if n not in chosen}
            read = self._interface.read(own)[0]
            require_no_cache(read, 'use format "onnx-generate", which writes graphs with a cache')
            present = with_choices(self._compilation, read, chosen)
            signature = signature_for(self._compilation, present)
        return export_model(self, as_path(path), format, signature, inputs=inputs, certificate=certificate, force=force)

    def _export_cached(self, path: Path, certificate: Certificate | None, force: bool) -> Path:
        from graftc.runtime.export.cached import export_cached

        simplest = self._deployed()
        return export_cached(simplest, path, certificate=certificate, force=force)

    def _export_peft(self, path: Path, force: bool, server: str | None) -> Path:
        """Write the adapters as peft's checkpoint; only a compiled model has some."""
        raise GraftError("GC115", "a merged model has no adaptation", hint="export the compiled model it was made from")

    def _export_gguf(self, path: Path, dtype: Literal["f32", "f16", "bf16"], force: bool) -> Path:
        """Write a GGUF file: of a compiled model its LoRAs, of a merged one all of it."""
        raise NotImplementedError

    def _deployed(self) -> Exporting:
        """What an export writes."""
        return self
