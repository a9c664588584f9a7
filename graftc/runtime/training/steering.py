"""Steer training: the methods that a loop, or the transformers Trainer, calls for controllers and objectives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from graftc.compat.modules import parameters_of
from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.figures import Figure, Figures, as_numbers, live_figures
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.steering import live_places
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.core.method.capabilities import Initialised, Ranked, one_rank
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.method.steering import wide
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.sharding import Spread, all_whole, sharded_modules
from graftc.passes.methods.bases.sparse import SELECTED
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.training.callbacks import SteeringCallback, for_trainer
from graftc.runtime.training.repeated import repeated, waited
from graftc.specs.errors.arguments import require_count
from graftc.specs.errors.diagnostics import unknown_name, warn

if TYPE_CHECKING:
    from transformers import TrainerCallback


def _note(trained: set[str], name: str, gradient: Tensor) -> None:
    trained.add(name)


_NO_OBJECTIVE = "{names} has an objective, but the loss did not include it"
_NOT_INITIALISED = "{names} was trained before its initial values were computed from examples"
_NO_CONTROLLER = "{names} was trained without the updates that it makes between optimiser steps"


def watch_training(runner: AdaptedRunner, names: Iterable[str] | None = None) -> None:
    """Record when adaptations (by default all) are trained, so that missing steering can be reported."""
    every = {*runner.steering.controllers, *runner.steering.objectives, *TrainingSteering(runner).uninitialised}
    for name in every if names is None else every & {*names}:
        tensors = (t for n, t in runner.compilation.store.adapters() if owner_of(n) == name and t.requires_grad)
        first = next(tensors, None)
        if first is not None:
            # A hook is needed, because gradients leave no trace after they have been zeroed.
            first.register_hook(partial(_note, runner.progress.trained, name))  # type: ignore[no-untyped-call]


class TrainingSteering:
    """Steers the training of a compiled model; a loop calls it to run controllers and objectives.

    Args:
        runner: the Runner of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    def begin(self, total_steps: int) -> None:
        """Set the total number of optimiser steps, for adaptations with a schedule.

        Args:
            total_steps: the total number of steps, including those before a resume.

        Raises:
            GraftError: GC026 if a schedule does not fit into this number of steps, GC073 if ``total_steps`` is not a
                number of steps.
        """
        require_count(total_steps, "total_steps", "pass the total number of optimiser steps")
        for controller in self.runner.steering.controllers.values():
            controller.begin(total_steps)

    def steps_left(self, steps: int) -> None:
        """Set the number of remaining optimiser steps; like `begin`, but counted from now.

        Args:
            steps: the number of remaining optimiser steps.

        Raises:
            GraftError: GC026 if a schedule does not fit.
        """
        for controller in self.runner.steering.controllers.values():
            controller.begin(controller.steps + steps)

    def extra_loss(self) -> Tensor:
        """Return the sum of all objectives (0 if none), to add to the loss once per optimiser step.

        The sum is a scalar in float32, or in float64 if an objective is.

        Objectives that compare several passes of a call are part of the loss that the model returns, not of this sum.
        If the model returned no loss, because there were no labels, the sum includes the mean of these objectives over
        the calls since the last `extra_loss`: add it before the backward pass through those calls.
        """
        progress = self.runner.progress
        progress.extra_losses += 1
        progress.due = False
        with self._whole(self.runner.steering.objectives, write=False):
            terms = [objective.value() for objective in self.runner.steering.objectives.values()]
        terms += waited(self.runner.progress)
        if not terms:
            return torch.zeros((), device=self.runner.compilation.store.device())
        return torch.stack([wide(term) for term in terms]).sum()

    def after_step(self) -> None:
        """Run the updates that adaptations make between optimiser steps.

        Call this after ``optimizer.step()`` and before ``optimizer.zero_grad()``.

        Raises:
            GraftError: GC026 if an adaptation has a schedule but `begin` has not been called, GC035 if it reads
                gradients but they have been zeroed.
        """
        if self.runner.progress.due or not self.runner.progress.extra_losses:
            self.warn_once(
                self.runner.steering.objectives, _NO_OBJECTIVE, "add compiled.extra_loss() to the loss of each step"
            )
        if self.runner.progress.waiting:  # compiled code has no hooks that could detect it earlier
            waited(self.runner.progress)
            self._miss()
        self.runner.progress.due = bool(self.runner.steering.objectives)
        with self._whole(self.runner.steering.controllers, write=True):
            for controller in self.runner.steering.controllers.values():
                controller.after_step()

    def _whole(self, names: Collection[str], *, write: bool) -> AbstractContextManager[None]:
        """Return a context in which sharded tensors of the given adaptations are gathered; see `all_whole`."""
        store = self.runner.compilation.store
        if not names or not any(sharded_modules(store.root)):
            return nullcontext()
        owners = {name.rpartition(".")[0] for name, _ in store.adapters() if owner_of(name) in names}
        return all_whole([parameters_of(store.owner(path)) for path in sorted(owners)], write=write)

    def skip_step(self) -> None:
        """Record that the gradients since the last `after_step` were discarded; call this instead of `after_step`.

        Gradient scalers discard infinite gradients.
        """
        for controller in self.runner.steering.controllers.values():
            controller.skip_step()

    def pause(self) -> None:
        """Release everything that controllers have prepared for training."""
        if self.runner.shown.steering is not None:
            for controller in self.runner.shown.steering.controllers.values():
                controller.pause()

    def results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the flat outputs of a call, after controllers have prepared for it.

        Code compiled by `torch.compile` has no hooks, so controllers are not called within it.
        """
        runner, controllers = self.runner, self.runner.steering.controllers
        if not is_traced() and controllers:
            if runner.training and torch.is_grad_enabled() and not runner.base_only:
                spread = Spread.of(runner.compilation.store.root)
                for controller in controllers.values():
                    if spread is not None:
                        controller.check_spread(spread)
                    controller.before_forward()
            else:
                self.pause()
        observer = runner.progress.observer
        if observer is None or is_traced() or not runner.training or key.entry == "scores":
            return repeated(runner, key, present, self._miss)
        with observer.watching():
            return repeated(runner, key, present, self._miss)

    def callback(self) -> TrainerCallback:
        """Return a callback that steers training in the transformers Trainer."""
        return cast("TrainerCallback", for_trainer(SteeringCallback)(self.runner))

    def warn_of_unsteered(self) -> None:
        """Warn (GC025) about adaptations trained without the steering that their methods require."""
        trained = self.runner.progress.trained
        hint = "call compiled.after_step() after each optimiser step, or pass compiled.callback() to the Trainer"
        idle = [name for name, c in self.runner.steering.controllers.items() if name in trained and c.steps == 0]
        self.warn_once(idle, _NO_CONTROLLER, hint)
        if not self.runner.progress.extra_losses:
            hint = "add compiled.extra_loss() to the loss, or pass compiled.callback() to the Trainer"
            self.warn_once([name for name in self.runner.steering.objectives if name in trained], _NO_OBJECTIVE, hint)
        store, parts = self.runner.compilation.store, self.runner.compilation.parts
        hint = "train the model that compiled.initialise(batches) returns, or let graftc.tune do both"
        self.warn_once([name for name in self.uninitialised if name in trained], _NOT_INITIALISED, hint)
        for name in self.unselected:
            deltas = (n for tensors in parts[name].values() for part, n in tensors.items() if part.endswith("_delta"))
            if any(bool(store.get(delta).any()) for delta in deltas):
                hint = "train the model that compiled.select(examples) returns, or let graftc.tune do both"
                self.warn_once([name], "{names} was trained at random entries, before selection by examples", hint)

    @property
    def unselected(self) -> tuple[str, ...]:
        """The names of adaptations whose entries have yet to be selected by examples."""
        store = self.runner.compilation.store
        names = []
        for resolved in self.runner.compilation.main.resolved:
            flag = self.runner.compilation.parts.get(resolved.name, {}).get(None, {}).get(SELECTED)
            if flag is not None and not bool(store.get(flag)):
                names.append(resolved.name)
        return tuple(names)

    @property
    def uninitialised(self) -> tuple[str, ...]:
        """The names of adaptations whose initial values have yet to be computed from examples."""
        compilation = self.runner.compilation
        methods = {str(spec.name): (spec, method_for(spec.method)) for spec in compilation.spec.adapt}
        # Looking up places writes layers out that are called as functions.
        asking = {
            name: method
            for name, (spec, method) in methods.items()
            if isinstance(method, Initialised) and method.starts_from(spec, ()) is not None
        }
        names = []
        for resolved in compilation.main.resolved if asking else ():
            method = asking.get(resolved.name)
            if method is not None:
                places, _ = live_places(compilation, resolved)
                if method.starts_from(resolved.spec, places) is not None:
                    names.append(resolved.name)
        return tuple(names)

    def _miss(self) -> None:
        """Warn that the gradient of a term that compares passes was not computed."""
        hint = "pass labels to the model, or add compiled.extra_loss() to the loss before its backward pass"
        self.warn_once(self.runner.steering.outputs, _NO_OBJECTIVE, hint)

    def warn_once(self, names: Iterable[str], text: str, hint: str) -> None:
        """Warn about adaptations, once for each of them."""
        new = [name for name in names if f"{name}: {text}" not in self.runner.progress.warned]
        self.runner.progress.warned.update(f"{name}: {text}" for name in new)
        if new:
            warn("GC025", text.format(names=", ".join(map(repr, new))), hint=hint)

    def deploy_rank(self, name: str, rank: int) -> None:
        """Choose the rank that an adaptation has in eval mode, in exports and when it is folded.

        Args:
            name: an adaptation whose method trains for many ranks at once.
            rank: the rank, from 1 to the rank in its spec. It is stored with the tensors, so it is saved and loaded.

        Raises:
            GraftError: GC055 for another method or an invalid rank, GC091 if there is no such adaptation.
        """
        resolved = self._named(name)
        _, shared = live_places(self.runner.compilation, resolved)
        method = method_for(resolved.spec.method)
        if not isinstance(method, Ranked):
            raise one_rank(resolved.spec)
        method.deploy_rank(resolved.spec, shared, rank)

    def rank_pattern(self, name: str) -> dict[str, Tensor]:
        """Return masks of the ranks of an adaptation that currently have an effect, by site.

        Pruned triplets, ranks whose gates are zero and ranks that are not deployed have no effect.

        Args:
            name: a low-rank adaptation.

        Returns:
            ``bool[..., rank]`` by site; an experts axis comes first. Empty for methods whose ranks all have an effect.

        Raises:
            GraftError: GC091 if there is no such adaptation.
        """
        resolved = self._named(name)
        places, shared = live_places(self.runner.compilation, resolved)
        method = method_for(resolved.spec.method)
        if not isinstance(method, Ranked):
            return {}
        with self._whole([name], write=False):
            return {str(p.site.key): method.live_ranks(p.spec, {**shared, **p.tensors}) for p in places}

    def site_figures(self) -> Figures:
        """Return the current figures of every site.

        These are the number of ranks that have an effect (AdaLoRA, SoRA, DyLoRA), the fraction of entries that the last
        replacement changed (SpIEL), and the fraction that pruning keeps. Gate values and routes belong to forward
        passes; `TrainingLog` records them.

        Returns:
            Values by adaptation, site and name: ``{"adalora": {"encoder.layer.0...": {"rank": 4.0}}}``. Adaptations
            without figures are left out.
        """
        return as_numbers(self.figures())

    def figures(self) -> list[Figure]:
        with self._whole({r.name for r in self.runner.compilation.main.resolved}, write=False):
            return list(live_figures(self.runner.compilation, self.runner.steering.controllers))

    def _named(self, name: str) -> Resolved:
        known = {resolved.name: resolved for resolved in self.runner.compilation.main.resolved}
        if name not in known:
            raise unknown_name("adaptation", name, known)
        return known[name]
