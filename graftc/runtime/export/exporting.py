"""Exporting a compiled or merged model: every format, with what each of them is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.capture.isolation import isolated
from graftc.compiler.capture.past import require_no_cache
from graftc.compiler.capture.signature import fits
from graftc.compiler.folding.certificate import Certificate
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.program_key import Signature
from graftc.runtime.export.cached import export_cached
from graftc.runtime.export.labels import without_labels
from graftc.runtime.export.writing import FoldEvidence, export_model
from graftc.runtime.model.choices import with_choices
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.sharded import written_once
from graftc.runtime.model.views import with_every_adaptation
from graftc.runtime.progress import during
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.options.exports import FileType, options_for

R = TypeVar("R", bound=ModelRunner)


class Exporting(Generic[R]):
    """Exports a compiled or merged model.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: R) -> None:
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
        """Export the model in eval mode, a merged one folded, with its certificate in the metadata. Arguments and
        errors are those of `Compiled.export`."""
        given = {"example_inputs": example_inputs, "inputs": inputs, "dtype": dtype}
        options = options_for(format, {**given, "server": server, "max_rank": max_rank})
        folded, certificate = self.evidence()
        return self.written(as_path(path), format, options, certificate, folded, force=force)

    @with_every_adaptation
    def written(
        self,
        path: Path,
        format: str,
        options: Mapping[str, Any],
        certificate: Certificate | None,
        folded: Sequence[str],
        *,
        force: bool,
    ) -> Path:
        """Write an export. See `export`.

        Args:
            path: the file or folder.
            format: of those in `graftc.specs.options.exports`.
            options: as `options_for` gives them.
            certificate: what a graph says of a fold.
            folded: whose adaptations have gone into the weights.
            force: replace what is there.
        """
        if format == "peft":
            return self._export_peft(path, force, **options)
        if format == "gguf":
            return self._export_gguf(path, options.get("dtype", "f32"), force)
        simplest = self._simplest()
        if format == "onnx-generate":
            return export_cached(simplest, path, certificate=certificate, folded=folded, force=force)
        kind = cast('Literal["onnx", "pt2"]', format)
        signature = _exported_signature(simplest, options.get("example_inputs"))
        said, inputs = FoldEvidence(certificate, folded), options.get("inputs", ())
        return export_model(simplest, path, kind, signature, said, inputs=inputs, force=force)

    def evidence(self) -> tuple[Sequence[str], Certificate | None]:
        """Whose adaptations have gone into the weights, and the certificate of that."""
        return (), None

    def _export_peft(self, path: Path, force: bool, server: str | None = None, max_rank: int | None = None) -> Path:
        """Write the adapters as peft's checkpoint; only a compiled model has some."""
        raise GraftError("GC115", "a merged model has no adaptation", hint="export the compiled model it was made from")

    def _export_gguf(self, path: Path, dtype: FileType, force: bool) -> Path:
        """Write a GGUF file: of a compiled model its LoRAs, of a merged one all of it."""
        raise NotImplementedError

    def _simplest(self) -> ModelRunner:
        """What a graph is written of."""
        return self.runner


def _exported_signature(runner: ModelRunner, example_inputs: ExampleInputs | None) -> Signature:
    """The signature of a call, without labels; by default of the one that the model was compiled with, at the sizes
    that were shown then, where a graph holds for one size only."""
    compilation = runner.compilation
    chosen: dict[str, Any] = {}
    if example_inputs is None:
        main = compilation.program("train", "base")
        shown = compilation.main.shown
        made = ((a, shown.get(a.name, a.example(runner.device))) for a in compilation.main.axes)
        present: dict[str, Any] = {a.name: value.to(runner.device, a.dtype) for a, value in made}
        present |= dict(main.flags)
        labelled = without_labels(runner, present).keys() != present.keys()
        if not labelled and (not shown or fits(main.inputs, present)):
            return compilation.main.signature
    else:
        examples = runner.interface.examples(example_inputs)
        chosen = {n: v for n, v in examples.items() if n in compilation.controls}
        present = runner.interface.read({n: v for n, v in examples.items() if n not in chosen})[0]
        require_no_cache(present, 'use format "onnx-generate", which writes graphs with a cache')
    present = without_labels(runner, present)
    return signature_for(compilation, with_choices(compilation, present, chosen))
