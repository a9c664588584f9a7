"""Do what a model's first calls would do, at a time of the user's choosing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import MASK
from graftc.passes.core import progress
from graftc.runtime.activations.training_code import TrainingCode
from graftc.runtime.model.runner import in_eval_mode
from graftc.specs.errors.arguments import as_mapping
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.runtime.compiled import CompiledRunner

_PROMPT = 4
"""Tokens of the text that something is generated behind."""


def warm_up(runner: CompiledRunner, batch: Mapping[str, Any], *, generate: bool = False) -> None:
    """See `CompiledRunner.warm_up`."""
    given = as_mapping(batch, "the batch", object)
    with exclusive(), progress.working("warming up", type(runner.compilation.source).__name__):
        if runner.training:
            _make_ready(runner, given)
        with in_eval_mode(runner.module):
            _make_ready(runner, {**given})
            if generate:
                progress.step("generate")
                _generate(runner, given)


def _make_ready(runner: CompiledRunner, given: Mapping[str, Any]) -> None:
    """Code for a call in the mode that the model is in, and the plan of what a training step keeps."""
    present = runner.read_call(dict(given))
    key = runner.ready(present)
    code = runner.code_of(key)
    if isinstance(code, TrainingCode):
        progress.step("plan")
        with torch.enable_grad():
            code.prepare(runner.module, runner.inputs(key, present))


def _generate(runner: CompiledRunner, given: Mapping[str, Any]) -> None:
    """One step of generating behind the beginning of a row, so that there is code for a prompt and what follows it."""
    ids = given.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise GraftError("GC073", "the batch has no input_ids [batch, sequence] to generate behind", hint="give them")
    text = {name: given[name][:1, :_PROMPT] for name in ("input_ids", MASK) if isinstance(given.get(name), Tensor)}
    with torch.no_grad(), torch.random.fork_rng(devices=[] if ids.device.type == "cpu" else [ids.device]):
        runner.generate(**text, min_new_tokens=2, max_new_tokens=2, do_sample=False)
