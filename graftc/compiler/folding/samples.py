"""Choose the inputs on which certificates run a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graftc.compiler.capture.example_inputs import random_inputs
from graftc.compiler.compilation import Compilation
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Signature

_TEXT = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "labels")
"""Suffixes of the names of inputs that may be random, independently of the other inputs."""


def beyond_text(program: Program) -> bool:
    """Return whether a Program takes token ids together with inputs that are not text, such as images.

    The ids mark the places of these inputs, so random ids would make no sense.
    """
    names = program.signature
    return any(name.endswith("input_ids") for name in names) and not all(name.endswith(_TEXT) for name in names)


def remember(compilation: Compilation, signature: Signature, present: Mapping[str, object]) -> None:
    """Store the first call's inputs if random inputs would make no sense and no example inputs were given."""
    main, table = compilation.main, compilation.table
    if main.signature != signature or main.shown or table.first_call is not None:
        return
    if beyond_text(compilation.program_as_run("train", "base")):
        tensors = {name: value for name, value in present.items() if isinstance(value, Tensor)}
        table.first_call = {name: value.detach().clone() for name, value in tensors.items()}


def samples(compilation: Compilation) -> dict[str, Tensor]:
    """Return inputs for the first signature: random ones, or the caller's if random ones would make no sense."""
    base, store, main = compilation.program("train", "base"), compilation.store, compilation.main
    shown = {**(compilation.table.first_call or {}), **main.shown}
    if (beyond_text(base) or any(axis.as_shown for axis in main.axes)) and shown.keys() >= set(base.signature):
        device = store.device()
        return {spec.name: shown[spec.name].to(device, spec.dtype) for spec in base.inputs}
    return random_inputs(base, store, config=getattr(compilation.source, "config", None))
