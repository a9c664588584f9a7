"""The root of a live model, which runs the source's own forward over the Store's tensors, with graphs as its layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from graftc.compat.autograd import is_transformed
from graftc.compat.hooks import CALL_HOOKS, backward_hooks
from graftc.compat.modules import buffers_of, parameters_of
from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.refusals import adapted_tensors
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir.program_key import ProgramKey, Signature
from graftc.passes.core.packing.modules import hold_values
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.runtime.live.deferred_logits import deferred, is_head
from graftc.runtime.live.element_run import GraphRunner, run_element
from graftc.runtime.live.guarded import RUNNING, guarded, runs_base
from graftc.runtime.live.own_buffers import OwnBuffers
from graftc.specs.errors.diagnostics import GraftError, warn


class _Ran:
    """The Runners that have called a live model, for layers that are called again in a backward pass.

    Attributes:
        chunked: whether the last call computed a loss in one graph with its head.
    """

    def __init__(self) -> None:
        self._runners: dict[int, GraphRunner] = {}
        self._keys: dict[tuple[int, Signature], ProgramKey] = {}
        self.chunked = False

    def note(self, runner: GraphRunner) -> None:
        """Record a call by a Runner, and forget the Runners that now show another view."""
        known = {shown: each for shown, each in self._runners.items() if id(each.shown) == shown}
        known.setdefault(id(runner.shown), runner)
        self._runners, self._keys, self.chunked = known, {}, False

    def key(self, runner: GraphRunner, signature: Signature) -> ProgramKey:
        """Return the key of the Program that a Runner runs; the modes of modules do not change within a call."""
        if (known := self._keys.get((id(runner), signature))) is None:
            known = self._keys[id(runner), signature] = runner.key(signature, runner.mode_of(signature))
        return known

    def only(self, path: str) -> GraphRunner:
        """Return the only Runner that has called the model.

        Raises:
            GraftError: GC031 if there are several.
        """
        if len(self._runners) == 1:
            return next(iter(self._runners.values()))
        message = f"{path} is called again after a forward pass, but the model has run with other adaptations since"
        raise GraftError("GC031", message, hint="recompute activations with checkpoint: layers in the spec")


class _Part:
    """Mixin for a module that is part of a graph.

    Setting one of its attributes during a call raises an error, because the graph does not read the attribute.
    """

    _graftc_path: str

    def __setattr__(self, name: str, value: Any) -> None:
        if RUNNING.get(None) is not None and vars(self).get(name, RUNNING) is not value:
            message = (
                f"the model's own Python sets {name} of {self._graftc_path}, which is a graph that does not read it"
            )
            hint = "compile with example inputs for which this happens: each map then becomes a graph"
            raise GraftError("GC031", message, hint=hint)
        super().__setattr__(name, value)


class _Inside(_Part):
    """Mixin placed before a module's class in the MRO, for a module inside a layer that runs as a graph."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise GC031, because the layer that contains the module is one graph, which does not call the module."""
        message = f"{self._graftc_path} is called directly, but the layer that contains it is one graph"
        raise GraftError(
            "GC031", message, hint="compile with example inputs that call it this way: each map then becomes a graph"
        )


class _Element(_Part):
    """Mixin placed before a layer's class in the MRO, so that the layer runs as a graph."""

    _graftc_ran: _Ran

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the graph's results, or deferred logits for a head that a loss may follow."""
        runner = RUNNING.get(None) or self._graftc_ran.only(self._graftc_path)
        module = cast(nn.Module, self)
        if _may_wait(runner, module, args, kwargs):
            call = partial(run_element, runner, module, args, kwargs)
            return deferred(call, cast(nn.Linear, module), args[0], self._graftc_path)
        return run_element(runner, module, args, kwargs)


class LiveRoot:
    """A copy of the source that runs its own Python; it shares tensors with a Store, but no modules with the source.

    Args:
        source: the model that was taken apart; it is not changed.
        store: the tensors to run on, whose weights are packed as the source's, or all in full precision.
        elements: the paths of its layers that run as graphs.
        adapted: for each tensor (by name) whose values the Python between graphs must not read, its adaptations.
    """

    def __init__(
        self, source: nn.Module, store: Store, elements: Collection[str], adapted: Mapping[str, tuple[str, ...]]
    ) -> None:
        self.model: nn.Module = sharing_copy(source)
        for module in self.model.modules() if not store.packed else ():
            hold_values(module, empty=True)
        self._adapted = {part: owners for name, owners in adapted.items() for part in store.parts_of(name)}
        self._guarded: dict[str, tuple[Tensor, Tensor]] = {}
        self._ran, self._warned = _Ran(), False
        self._inside: dict[int, bool] = {}
        for path in elements:
            for name, module in self.model.get_submodule(path).named_modules():
                self._inside[id(module)] = bool(name)
                if not name or any(True for _ in module.parameters()):
                    _put_in_front(_Inside if name else _Element, module, f"{path}.{name}".rstrip("."))
                if not name:
                    vars(module)["_graftc_ran"] = self._ran
        self._modules = list(self.model.named_modules(remove_duplicate=False))
        numbers = {path: number for number, (path, _) in enumerate(self._modules)}
        self._above = [(numbers[path.rpartition(".")[0]], path.rpartition(".")[2]) for path in numbers]
        self._own = OwnBuffers((path, module) for path, module in self._modules if id(module) not in self._inside)
        self._hooked: dict[tuple[str, str], set[int]] = {}

    @classmethod
    def of(cls, compilation: Compilation, store: Store) -> LiveRoot | None:
        """Return a live root for a compiled model; None if the model is one graph."""
        if compilation.whole is None:
            return None
        return cls(compilation.whole, store, elements_in(compilation.flags), adapted_tensors(compilation))

    def call(self, runner: GraphRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a call, as the source model returns them.

        Args:
            runner: the Runner that runs the layers.
            args, kwargs: the arguments of the call.
        """
        with self._running(runner):
            outputs = self.model(*args, **kwargs)
            self._warn_of_whole(runner, outputs)
            return outputs

    def _warn_of_whole(self, runner: GraphRunner, outputs: Any) -> None:
        """Issue GC151 once if the spec requests a chunked loss but the loss is not in one graph with a head."""
        wanted = runner.shown.compilation.spec.memory.loss == "chunked" and self.model.training
        if not wanted or self._ran.chunked or self._warned:
            return
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            self._warned = True
            message = "the loss is computed as a whole: it is not a cross-entropy of a linear map's outputs"
            warn("GC151", message, hint="remove memory: {loss: chunked}")

    def generate(self, runner: GraphRunner, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the source's own ``generate``."""
        with self._running(runner):
            return cast(Any, self.model).generate(*args, **kwargs)

    @contextmanager
    def _running(self, runner: GraphRunner) -> Iterator[None]:
        """Run the block with a Runner's graphs as the layers and with its Store's tensors."""
        self._bind(runner)
        self._ran.note(runner)
        token = RUNNING.set(runner)
        try:
            yield
        finally:
            RUNNING.reset(token)
            if not runs_base(runner):
                self._own.keep(runner.store)

    def _bind(self, runner: GraphRunner) -> None:
        """Update the live modules with the Store's tensors and modes, which may have moved or changed."""
        if is_unit(runner.module):
            message = "FSDP2 shards modules that are graphs, but this model runs its own Python between graphs"
            raise GraftError("GC130", message, hint="replicate it with DistributedDataParallel")
        hooked, store = bool(self._hooked), runner.store
        containers: list[nn.Module] = []
        for (path, module), (above, last) in zip(self._modules, self._above, strict=True):
            container = store.inside(containers[above], last) if path else store.root
            containers.append(container)
            vars(module)["training"] = container.training
            if path and (hooked or any(vars(container)[hooks] for hooks in CALL_HOOKS)):
                self._hook(path, module, container)
            tables: list[dict[str, Any]] = [parameters_of(module)]
            tables += [buffers_of(module)] if id(module) in self._inside else []
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        own = parameters_of(container).get(name)
                        table[name] = self._seen(store, f"{path}.{name}" if path else name, own)
        self._own.bind(runner.store, base=runs_base(runner))

    def _seen(self, store: Store, name: str, tensor: Tensor | None) -> Tensor:
        """Return a tensor of the Store as the Python between graphs sees it."""
        tensor, owner = store.get(name) if tensor is None else tensor, store.canonical(name)
        if owner not in self._adapted:
            return tensor
        known = self._guarded.get(owner)
        if known is None or known[0] is not tensor:
            known = self._guarded[owner] = tensor, guarded(tensor, owner, self._adapted[owner])
        return known[1]

    def _hook(self, path: str, module: nn.Module, compiled: nn.Module) -> None:
        """Update the live module with the hooks of the compiled model's module; the live module's own hooks stay.

        Raises:
            GraftError: GC043 for a hook on a module inside a layer that runs as a graph.
        """
        if self._inside.get(id(module)) and any(vars(compiled)[hooks] for hooks in CALL_HOOKS):
            message = f"{path} has a hook, but the layer that contains it is one graph, which calls no hooks"
            raise GraftError("GC043", message, hint="hook the layer, or hook the source model and compile that")
        for name in CALL_HOOKS:
            own, wanted = vars(module)[name], vars(compiled)[name]
            for number in self._hooked.pop((path, name), set()) - wanted.keys():
                own.pop(number, None)
            if wanted:
                own.update(wanted)
                self._hooked[path, name] = set(wanted)


def _put_in_front(stand_in: type, module: nn.Module, path: str) -> None:
    """Place a class before a module's own class in the MRO."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (stand_in, cls), {"__module__": __name__, "__doc__": cls.__doc__})
    vars(module)["_graftc_path"] = path


def _may_wait(runner: GraphRunner, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call may be to a head whose loss is computed in chunks."""
    if runner.shown.compilation.spec.memory.loss == "whole" or not is_head(module):
        return False
    training = module.training and torch.is_grad_enabled() and not is_traced()
    watched = is_transformed() or bool(backward_hooks(module))
    return training and not watched and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
