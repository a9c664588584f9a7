"""Choose the signature for which a graph is exported."""

from __future__ import annotations

from typing import Any

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.capture.past import require_no_cache
from graftc.compiler.capture.signature import fits
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.program_key import Signature
from graftc.runtime.export.labels import without_labels
from graftc.runtime.model.choices import with_choices
from graftc.runtime.model.model_runner import ModelRunner


def exported_signature(runner: ModelRunner, example_inputs: ExampleInputs | None) -> Signature:
    """Return a call's signature, without labels.

    The default is the call that the model was compiled with, at its original sizes if a graph is valid only for one
    size.
    """
    compilation = runner.compilation
    chosen: dict[str, Any] = {}
    if example_inputs is None:
        main = compilation.program("train", "base")
        shown = compilation.main.shown
        values = ((a, shown.get(a.name, a.example(runner.device))) for a in compilation.main.axes)
        present: dict[str, Any] = {a.name: value.to(runner.device, a.dtype) for a, value in values}
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
