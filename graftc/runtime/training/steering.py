"""Training beside the graph: what a loop, or the transformers Trainer, has to call for controllers and objectives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.figures import Figure, Figures, as_numbers, live_figures
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.steering import Steerings, live_places, steerings
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.passes.core.method.capabilities import Ranked, one_rank
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.sharding import Spread, all_whole, sharded_modules
from graftc.runtime.training.repeated import Repeated
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, unknown_name, warn

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from graftc.runtime.training.observing import Observer


def _note(trained: set[str], name: str, gradient: Tensor) -> None:
    trained.add(name)


_NO_OBJECTIVE = "{names} has an objective, and the loss was without it"
_NO_CONTROLLER = "{names} was trained without what it does between optimiser steps"


class Steered(Repeated):
    """The part of `Compiled` that steers training."""

    @cached_property
    def _steering(self) -> Steerings:  # type: ignore[override]
        return steerings(self._compilation)

    @cached_property
    def _trained(self) -> set[str]:
        """Adaptations with a controller or an objective whose tensors have had a gradient."""
        return set()

    @cached_property
    def _warned(self) -> set[str]:
        return set()

    _observer: Observer | None = None
    """Reads numbers of the forward passes to come, where somebody has asked for them."""

    _objectives_used = 0
    _objectives_due = False

    def _watch(self, names: Iterable[str] | None = None) -> None:
        """Notice when an adaptation is trained, so that its steering can be missed: of some, by default of all."""
        every = {*self._steering.controllers, *self._steering.objectives}
        for name in every if names is None else every & {*names}:
            own = (t for n, t in self._compilation.store.adapters() if owner_of(n) == name and t.requires_grad)
            first = next(own, None)
            if first is not None:
                # A hook, since zeroing gradients leaves no trace of them.
                first.register_hook(partial(_note, self._trained, name))  # type: ignore[no-untyped-call]

    def begin(self, total_steps: int) -> None:
        """Say how many optimiser steps the training has, for adaptations with a schedule.

        Args:
            total_steps: in all, those before a resume included.

        Raises:
            GraftError: GC026 where a schedule does not fit into that many, GC073 for what is not a number of steps.
        """
        given: Any = total_steps
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            shown = repr(given) if isinstance(given, int) else kind_of(given)
            raise GraftError("GC073", f"total_steps is {shown}", hint="give how many optimiser steps there are in all")
        for controller in self._steering.controllers.values():
            controller.begin(total_steps)

    def steps_left(self, steps: int) -> None:
        """`begin`, counted from now.

        Args:
            steps: how many optimiser steps are still to come.

        Raises:
            GraftError: GC026 where a schedule does not fit.
        """
        for controller in self._steering.controllers.values():
            controller.begin(controller.steps + steps)

    def extra_loss(self) -> Tensor:
        """The sum of the objectives of all adaptations, a float32 scalar to add to the loss once per optimiser step; 0
        where there are none.

        Objectives that compare several passes of a call are part of the loss that the model gives, and not of this.
        Where it gave none, because there were no labels, their mean over the calls since the last `extra_loss` is in
        here: add it before the backward pass of these calls.
        """
        self._objectives_used += 1
        self._objectives_due = False
        with self._whole(self._steering.objectives, write=False):
            terms = [objective.value() for objective in self._steering.objectives.values()]
        terms += self._waited()
        if not terms:
            device = self._compilation.store.device()
            return torch.zeros((), device=device)
        return torch.stack([term.float() for term in terms]).sum()

    def after_step(self) -> None:
        """What adaptations do between optimiser steps: call it after ``optimizer.step()`` and before
        ``optimizer.zero_grad()``.

        Raises:
            GraftError: GC026 where an adaptation has a schedule and nobody has called `begin`, GC035 where it looks at
                gradients and they have been zeroed.
        """
        if self._objectives_due or not self._objectives_used:
            self._warn(self._steering.objectives, _NO_OBJECTIVE, "add compiled.extra_loss() to the loss of each step")
        if self._waiting:  # compiled code has no hooks to notice it earlier
            self._waited()
            self._miss()
        self._objectives_due = bool(self._steering.objectives)
        with self._whole(self._steering.controllers, write=True):
            for controller in self._steering.controllers.values():
                controller.after_step()

    def _whole(self, names: Collection[str], *, write: bool) -> AbstractContextManager[None]:
        """Inside, tensors of these adaptations that are sharded are whole; see `all_whole`."""
        store = self._compilation.store
        if not names or not any(sharded_modules(store.root)):
            return nullcontext()
        owners = {name.rpartition(".")[0] for name, _ in store.adapters() if owner_of(name) in names}
        return all_whole([store.owner(path)._parameters for path in sorted(owners)], write=write)

    def skip_step(self) -> None:
        """Say that the gradients since the last `after_step` have been thrown away, as a gradient scaler does with
        infinite ones: instead of `after_step`."""
        for controller in self._steering.controllers.values():
            controller.skip_step()

    def entering(self, mode: bool) -> bool:
        """In eval mode nothing of a training is prepared for."""
        if not mode:
            self._pause()
        return mode

    def _pause(self) -> None:
        if "_steering" in vars(self):
            for controller in self._steering.controllers.values():
                controller.pause()

    def _results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """See `Repeated`. Controllers are asked before; compiled code has no hooks, so they are not asked there."""
        if not is_traced() and self._steering.controllers:
            if self.training and torch.is_grad_enabled() and not getattr(self, "_base_only", False):
                spread = Spread.of(self._compilation.store.root)
                for controller in self._steering.controllers.values():
                    if spread is not None:
                        controller.check_spread(spread)
                    controller.before_forward()
            else:
                self._pause()
        observer = self._observer
        if observer is None or is_traced() or not self.training or key.entry == "scores":
            return super()._results(key, present)
        with observer.watching():
            return super()._results(key, present)

    def callback(self) -> TrainerCallback:
        """A callback for the transformers Trainer that does all of this."""
        from graftc.runtime.training.callbacks import steering_callback

        return steering_callback(self)

    def warn_of_unsteered(self) -> None:
        """Warn (GC025) of adaptations trained and never steered: their method works differently without it."""
        trained = self._trained
        hint = "call compiled.after_step() after each optimiser step, or give the Trainer compiled.callback()"
        idle = [name for name, c in self._steering.controllers.items() if name in trained and c.steps == 0]
        self._warn(idle, _NO_CONTROLLER, hint)
        if not self._objectives_used:
            hint = "add compiled.extra_loss() to the loss, or give the Trainer compiled.callback()"
            self._warn([name for name in self._steering.objectives if name in trained], _NO_OBJECTIVE, hint)

    def _miss(self) -> None:
        """See `Repeated`: a term that compares passes has gone without its gradient."""
        hint = "give the model its labels, or add compiled.extra_loss() to the loss before its backward pass"
        self._warn(self._steering.outputs, _NO_OBJECTIVE, hint)

    def _warn(self, names: Iterable[str], text: str, hint: str) -> None:
        """Warn once of each adaptation."""
        new = [name for name in names if f"{name}: {text}" not in self._warned]
        self._warned.update(f"{name}: {text}" for name in new)
        if new:
            warn("GC025", text.format(names=", ".join(map(repr, new))), hint=hint)

    def deploy_rank(self, name: str, rank: int) -> None:
        """Choose the rank that an adaptation has in eval mode, in exports and where it folds.

        Args:
            name: an adaptation whose method trains for many ranks at once.
            rank: from 1 to the rank of its spec. It is kept with the tensors: saving and loading keep it.

        Raises:
            GraftError: GC055 for another method or rank, GC091 where there is no such adaptation.
        """
        resolved = self._named(name)
        _, shared = live_places(self._compilation, resolved)
        method = method_for(resolved.spec.method)
        if not isinstance(method, Ranked):
            raise one_rank(resolved.spec)
        method.deploy_rank(resolved.spec, shared, rank)

    def rank_pattern(self, name: str) -> dict[str, Tensor]:
        """Which ranks of an adaptation have an effect now: pruned triplets, gates at zero and ranks that are not
        deployed have none.

        Args:
            name: an adaptation of low rank.

        Returns:
            ``bool[..., rank]`` by site; experts lead. Empty for methods whose ranks all have an effect.

        Raises:
            GraftError: GC091 where there is no such adaptation.
        """
        resolved = self._named(name)
        places, shared = live_places(self._compilation, resolved)
        method = method_for(resolved.spec.method)
        if not isinstance(method, Ranked):
            return {}
        with self._whole([name], write=False):
            return {str(p.site.key): method.live_ranks(p.spec, {**shared, **p.tensors}) for p in places}

    def site_figures(self) -> Figures:
        """What training has made of every site so far: ranks that have an effect (AdaLoRA, SoRA, DyLoRA), the share of
        entries that the last replacement has replaced (SpIEL) or that pruning keeps. Values of gates and routes are
        those of a forward pass: `TrainingLog` records them.

        Returns:
            Numbers by adaptation, site and name: ``{"adalora": {"encoder.layer.0...": {"rank": 4.0}}}``. Adaptations
            without any are not in it.
        """
        return as_numbers(self._figures())

    def _figures(self) -> list[Figure]:
        with self._whole({r.name for r in self._compilation.main.resolved}, write=False):
            return list(live_figures(self._compilation, self._steering.controllers))

    def _named(self, name: str) -> Resolved:
        known = {resolved.name: resolved for resolved in self._compilation.main.resolved}
        if name not in known:
            raise unknown_name("adaptation", name, known)
        return known[name]
