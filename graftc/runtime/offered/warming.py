"""Prepare a model for its first calls at a time of the user's choosing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import MASK
from graftc.passes.core import progress
from graftc.runtime.activations.training_code import TrainingCode
from graftc.runtime.model.choices import with_choices
from graftc.runtime.model.evaluation import in_eval_mode
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.generation import Generating
from graftc.runtime.progress import working
from graftc.specs.errors.arguments import as_mapping
from graftc.specs.errors.diagnostics import GraftError

_PROMPT = 4
"""The number of tokens in the prompt for generation."""


class Warming(Feature):
    """Prepares a model for its first calls."""

    def warm_up(self, batch: Mapping[str, Any], *, generate: bool = False) -> None:
        """Do the work of the first calls now: capture and check their graphs, generate code, and plan a training step.

        This takes as long as it would in those calls, and shows progress. Nothing is trained: parameters, gradients,
        buffers and random states are unchanged. Graphs are checked against the source model; the plan determines which
        activations a training step keeps.

        For a model in train mode, the call is prepared in eval mode as well. Calls with the inputs and flags of the
        batch then start at once; a call with other inputs or flags is captured when it occurs.

        Args:
            batch: the arguments of a call by name, such as a batch from the data loader, with its ``labels``. Only the
                names, dtypes and sizes of tensors matter.
            generate: whether to prepare `generate` as well, for the prompt and for subsequent tokens: two tokens are
                generated after the first four of the batch's first text. Prompts with an ``attention_mask`` have their
                own graphs, so include one if your prompts have one.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, GC073 if the batch is not a mapping or, with
                ``generate``, has no ``input_ids``, and any error from `generate`.
        """
        given = as_mapping(batch, "batch", object)
        with exclusive(), working("warming up", self.runner):
            if self.runner.training:
                self._make_ready(given)
            with in_eval_mode(self.runner.module):
                self._make_ready(given)
                if generate:
                    progress.step("generate")
                    self._generate(given)

    def _make_ready(self, given: Mapping[str, Any]) -> None:
        """Prepare code for a call in the model's current mode, and plan which activations a training step keeps."""
        runner, shown = self.runner, self.runner.shown
        if runner.live is not None:
            self._call(given)
            return
        controls = shown.compilation.controls
        chosen = {name: value for name, value in given.items() if name in controls}
        rest = {name: value for name, value in given.items() if name not in controls}
        present, _ = runner.interface.read(runner.interface.named((), rest))
        present = with_choices(shown.compilation, present, chosen) if controls else present
        key = runner.ready(present)
        code = shown.executables[key].run
        if isinstance(code, TrainingCode):
            progress.step("plan")
            with torch.enable_grad():
                code.prepare(runner.module, runner.inputs(key, present))

    def _call(self, given: Mapping[str, Any]) -> None:
        """Call a live model, whose own Python decides how its layers are called, and restore what the call updates."""
        store = self.runner.store
        before = {name: store.get(name).clone() for name in store.updated}
        with torch.no_grad(), torch.random.fork_rng():
            self.runner.module(**given)
            for name in store.updated:
                if name in before:
                    store.get(name).copy_(before[name])

    def _generate(self, given: Mapping[str, Any]) -> None:
        """Generate two tokens after the start of a row, to prepare code for the prompt and for subsequent tokens."""
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            hint = "add input_ids"
            raise GraftError("GC073", "the batch has no input_ids [batch, sequence] as a prompt", hint=hint)
        text = {name: given[name][:1, :_PROMPT] for name in ("input_ids", MASK) if isinstance(given.get(name), Tensor)}
        with torch.no_grad(), torch.random.fork_rng(devices=[] if ids.device.type == "cpu" else [ids.device]):
            Generating(self.runner).generate(**text, min_new_tokens=2, max_new_tokens=2, do_sample=False)
