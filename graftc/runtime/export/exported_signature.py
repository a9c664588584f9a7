"""Choose the signature for which a graph is exported: a call, without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.interface import COUNT, ExampleInputs
from graftc.compiler.capture.past import require_no_cache
from graftc.compiler.capture.signature import fits
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.program import Program, above
from graftc.passes.core.ir.program_key import Signature
from graftc.runtime.model.choices import with_choices
from graftc.runtime.model.model_runner import ModelRunner

_LOSS = "loss"
_TARGETS = "future_values"
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")


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


def without_labels(runner: ModelRunner, present: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's tensors and flags without those that only a loss needs.

    Labels are the arguments that transformers regards as the class's labels, and those that only the output ``loss``
    depends on in the model's first graph. An argument that ``forward`` requires stays. A decoder that derives its
    tokens from the labels receives tokens instead; a model that accepts tokens but runs without them receives none.
    """
    from transformers.utils.generic import find_labels

    model, first = runner.compilation.model, runner.compilation.program("train", "base")
    labelled: Callable[[type], list[str]] = find_labels
    of_the_loss = _of_the_loss(first)
    known = {*labelled(type(model)), _TARGETS, COUNT, *of_the_loss}
    dropped = {name for name in present if name in known and runner.interface.optional(name)}
    inputs = {name: value for name, value in present.items() if name not in dropped}
    labels = present.get("labels") if "labels" in dropped else None
    tokens = {"labels", *_DECODED} - of_the_loss
    decodes = _DECODED[0] in runner.interface.parameters and not inputs.keys() & {*_DECODED}
    decodes = decodes and not tokens.isdisjoint(first.signature)
    if decodes and isinstance(labels, Tensor):
        inputs[_DECODED[0]] = torch.ones_like(labels, dtype=torch.int64)
    return inputs


def _of_the_loss(program: Program) -> set[str]:
    """Return the inputs that nothing but the loss depends on."""
    names, (values, *_) = program.outputs.names, program.output_node.args
    if _LOSS not in names or len(names) < 2 or not isinstance(values, tuple | list):
        return set()
    others = [v for name, v in zip(names, values, strict=True) if name != _LOSS and isinstance(v, torch.fx.Node)]
    needed = {*others, *above(others)}
    return {str(node.target) for node in program.placeholders() if node.users and node not in needed}
