"""Select entries by examples, and create the model for the next training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.identity.fingerprint import identify
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.steering import live_places
from graftc.passes.core.method.base_gradients import BaseGradients
from graftc.passes.core.method.capabilities import Scored, Staged, Transition
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.method.scoring import Scoring
from graftc.passes.core.weights.names import owner_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.evaluation import in_eval_mode
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.runtime.model.sharded import in_every_process
from graftc.runtime.training.steering import TrainingSteering
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError

Loss = Callable[[Any, Mapping[str, Any]], Tensor]
"""A function that takes a model's outputs and the example and returns a scalar."""


class Selecting:
    """Creates the model for the next training run.

    Args:
        runner: the Runner of the current model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    @in_every_process
    def select(self, examples: Iterable[Mapping[str, Any]], *, loss: Loss | None = None) -> Any:
        """Return a model whose adaptations train the entries that examples select, starting from their initial values.

        This model stays unchanged. Gradients are those of the whole model in eval mode, without dropout, and are
        handled one tensor at a time: they are added to the scores of the entries, in float32, and then freed.

        Args:
            examples: inputs by name, with labels; batches of any size. If a selection needs single examples, a batch is
                split along its first axis.
            loss: a function that takes the outputs and the example and returns a scalar; by default the loss that the
                model returns.

        Raises:
            GraftError: GC056 if no adaptation selects by examples, there are no examples, or there is no loss.
        """
        pending = self._pending(
            TrainingSteering(self.runner).unselected,
            "no adaptation has entries that are yet to be selected by examples",
            hint="compile the spec again to select again",
            on_meta="entries cannot be selected on the meta device",
        )
        examples = batches_for(pending, examples, "select")
        transitions: dict[str, Transition[Any]] = {}
        for resolved in pending:
            method = method_for(resolved.spec.method)
            assert isinstance(method, Scored)
            places, _ = live_places(self.runner.compilation, resolved)
            scoring = method.scoring(resolved.spec)
            assert scoring is not None
            scores = self._scores(method.scored(places), scoring, examples, loss)
            transitions[resolved.name] = method.selected(resolved.spec, places, scores)
        return self._after(transitions)

    def _pending(self, names: Iterable[str], nothing: str, *, hint: str, on_meta: str) -> Sequence[Resolved]:
        """Return the adaptations that are yet to see examples.

        Args:
            names: their names.
            nothing, hint: the message if there are none, and its hint.
            on_meta: the message for a base without values.

        Raises:
            GraftError: GC056 if there are none, or the base is on the meta device.
        """
        wanted = {*names}
        pending = [resolved for resolved in self.runner.compilation.main.resolved if resolved.name in wanted]
        if not pending:
            raise GraftError("GC056", nothing, hint=hint)
        if self.runner.device.type == "meta":
            raise GraftError("GC056", on_meta, hint="load the base's weights")
        return pending

    def _scores(
        self,
        names: Iterable[str],
        scoring: Scoring,
        examples: Iterable[Mapping[str, Any]],
        loss: Loss | None,
        caller: str = "select",
    ) -> dict[str, Tensor]:
        """Return a score for every entry of base tensors, accumulated over examples.

        Args:
            names: the names of the tensors.
            scoring: how gradients become scores.
            examples, loss: as for `select`.
            caller: the public function that is called, for errors.
        """
        store = self.runner.compilation.store
        tensors = {name: store.get(name) for name in names}
        scores = {n: torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for n, t in tensors.items()}
        count = 0
        taken = self._watched(tensors, lambda name, grad: scoring.add(scores[name], tensors[name].detach(), grad))
        with torch.enable_grad(), taken:
            for example in examples:
                for single in _single(example) if scoring.single else (example,):
                    outputs = self.runner.module(**single)
                    value = loss(outputs, single) if loss is not None else getattr(outputs, "loss", None)
                    if value is None:
                        hint = f"add labels to the examples, or pass your own loss: {caller}(examples, loss=...)"
                        raise GraftError("GC056", "the model returns no loss for the examples", hint=hint)
                    value.backward()
                    count += 1
        if not count:
            raise GraftError("GC056", "there are no examples", hint=f"pass batches of inputs to {caller}")
        return scores

    @contextmanager
    def _watched(self, tensors: Mapping[str, Tensor], take: Callable[[str, Tensor], None]) -> Iterator[None]:
        """Pass the gradients of base tensors to ``take`` while the block runs; backward passes compute no others."""
        trained = [p for p in self.runner.module.parameters() if p.requires_grad]
        gradients = BaseGradients(take)
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            gradients.want(tensors)
            with in_eval_mode(self.runner.module):
                yield
        finally:
            gradients.release()
            for parameter in trained:
                parameter.requires_grad_(True)

    @property
    def stages_left(self) -> int:
        """The number of training runs that follow the run for which this model was created."""
        return max((self._left(resolved) for resolved in self.runner.compilation.main.resolved), default=0)

    @staticmethod
    def _left(resolved: Resolved) -> int:
        method = method_for(resolved.spec.method)
        return (
            method.stages(resolved.spec) - int(getattr(resolved.spec, "stage", 1)) if isinstance(method, Staged) else 0
        )

    @in_every_process
    def advance(self, start: Mapping[str, Tensor] | None = None) -> Any:
        """Return the model for the training run that follows this model's own run; this model stays unchanged.

        Args:
            start: the adapter tensors with which this training run started, by name; some methods rewind everything
                that trains to these values. By default the initial values, with which a first run starts.

        Raises:
            GraftError: GC057 if no adaptation has a training run left.
        """
        due = [resolved for resolved in self.runner.compilation.main.resolved if self._left(resolved) > 0]
        if not due:
            raise GraftError("GC057", "no adaptation has training run left", hint="merge, save or export the model")
        transitions: dict[str, Transition[Any]] = {}
        for resolved in due:
            method = method_for(resolved.spec.method)
            assert isinstance(method, Staged)
            places, shared = live_places(self.runner.compilation, resolved)
            with torch.no_grad():
                transitions[resolved.name] = method.advance(resolved.spec, places, shared)
        return self._after(transitions, start)

    def joined(self, *others: ModelRoot) -> Any:
        """Return one model with the adaptations of several models on the same base: this model's, then the others'.

        Modules that the other models train in full, such as their heads, are left out; the models stay unchanged.
        Sparse fine-tunes add up, so that the fine-tunes for a task and for a language become one model.

        Args:
            others: the other compiled models, in order.

        Raises:
            GraftError: GC087 if a model has another base, GC005 if two adaptations have the same name.
        """
        mine = identify(self.runner.compilation.source).fingerprint
        spec, values = self.runner.compilation.spec, dict(self._others(()))
        for model in others:
            other = runner_of(model)
            compilation = other.compilation
            if identify(compilation.source).fingerprint != mine:
                raise GraftError("GC087", "models with different bases cannot be joined")
            adapt, compose = (*spec.adapt, *compilation.spec.adapt), (*spec.compose, *compilation.spec.compose)
            names = [str(a.name) for a in adapt]
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            if twice:
                hint = "give each its own name in its spec before training"
                raise GraftError("GC005", f"two of the models have an adaptation {twice[0]!r}", hint=hint)
            spec = spec.model_copy(update={"adapt": adapt, "compose": compose})
            selecting = Selecting(other)
            values |= selecting._others([TRAIN])
        return self._compiled(spec, values)

    def _others(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of all adaptations except the named ones."""
        gone = set(names)
        return {n: t for n, t in adapter_values(self.runner.compilation.store) if owner_of(n) not in gone}

    def _after(self, transitions: Mapping[str, Transition[Any]], start: Mapping[str, Tensor] | None = None) -> Any:
        """Return the model after transitions of some adaptations; the others continue, or restart if one rewinds."""
        others, spec = self._others(transitions), self.runner.compilation.spec
        if any(transition.rewind for transition in transitions.values()):
            others = {name: start[name] for name in others if name in start} if start is not None else {}
        values = {name: value for transition in transitions.values() for name, value in transition.values.items()}
        adapt = tuple(transitions[str(a.name)].spec if str(a.name) in transitions else a for a in spec.adapt)
        return self._compiled(spec.model_copy(update={"adapt": adapt}), {**others, **values})

    def _compiled(self, spec: Spec, values: Mapping[str, Tensor]) -> Any:
        compiled = self.runner.sibling(spec, values)
        compiled.train(self.runner.training)
        return compiled


def _batches(examples: Any, caller: str) -> Iterator[Mapping[str, Any]]:
    """Yield the batches that a public function was given.

    Raises:
        GraftError: GC056 for anything but a series of mappings.
    """
    hint = f"pass a list of batches, {caller}([batch]), each with the model's inputs by name"
    if isinstance(examples, Mapping | str) or not isinstance(examples, Iterable):
        raise GraftError("GC056", f"{kind_of(examples)} is not a series of batches", hint=hint)
    for example in examples:
        if not isinstance(example, Mapping):
            raise GraftError("GC056", f"{kind_of(example)} is not a batch of inputs", hint=hint)
        yield example


def batches_for(
    pending: Sequence[Resolved], examples: Iterable[Mapping[str, Any]], caller: str
) -> Iterable[Mapping[str, Any]]:
    """Return the batches that a public function was given, as a list if several adaptations iterate over them."""
    batches = _batches(examples, caller)
    return list(batches) if len(pending) > 1 else batches


def _single(example: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the examples of a batch one by one."""
    count = next((v.shape[0] for v in example.values() if isinstance(v, Tensor) and v.dim()), 1)
    for row in range(count):
        batched = {n: isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == count for n, v in example.items()}
        yield {name: value[row : row + 1] if batched[name] else value for name, value in example.items()}
