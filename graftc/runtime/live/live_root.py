"""The root of a live model: the source's own forward over the Store's tensors, whose layers are graphs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from graftc.compiler.capture.isolation import exclusive, is_traced
from graftc.compiler.capture.signature import fits
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.elements import (
    CALL_HOOKS,
    Recorded,
    as_inputs,
    in_autocast,
    is_live,
    place_in_row,
    without_autocast,
)
from graftc.compiler.live.levels import tried
from graftc.compiler.resolve.untie import sharing_copy
from graftc.compiler.signatures import add_signature
from graftc.passes.core.elements.behind import FollowingCall
from graftc.passes.core.elements.calls import CallStructure, calls_in, elements_in, input_name
from graftc.passes.core.elements.layer_cache import cache_among, write_back
from graftc.passes.core.elements.tables import put_into, tables_among
from graftc.passes.core.ir.program import InputSpec, Program
from graftc.passes.core.ir.program_key import Modes, ProgramKey, Signature
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.runtime.live.deferred_logits import deferred, is_head
from graftc.runtime.live.element_code import ElementCode
from graftc.runtime.live.own_buffers import OwnBuffers
from graftc.specs.errors.diagnostics import GraftError, warn


class GraphRunner(Protocol):
    """What runs graphs: see `graftc.runtime.model.model_runner.ModelRunner`."""

    store: Store
    shown: Any

    @property
    def module(self) -> nn.Module:
        """The root of the tree of tensors."""

    def key(self, signature: Signature, mode: Modes) -> ProgramKey:
        """The key of what a call runs."""

    def mode_of(self, signature: Signature) -> Modes:
        """The mode that a call is in."""

    def as_run(self, key: ProgramKey) -> Program:
        """The Program of a key, as code is made of it."""

    def install(self, key: ProgramKey, program: Program) -> None:
        """Make the code of a Program."""


_RUNNING: ContextVar[GraphRunner] = ContextVar("live runner")


class _Ran:
    """Who has called a live model, for layers that are called again in a backward pass.

    Attributes:
        chunked: whether the last call had a loss in one graph with its head.
    """

    def __init__(self) -> None:
        self._runners: dict[int, GraphRunner] = {}
        self.chunked = False

    def note(self, runner: GraphRunner) -> None:
        """Somebody calls; one that shows something else by now is forgotten."""
        known = {shown: each for shown, each in self._runners.items() if id(each.shown) == shown}
        known.setdefault(id(runner.shown), runner)
        self._runners, self.chunked = known, False

    def only(self, path: str) -> GraphRunner:
        """The one that has called.

        Raises:
            GraftError: GC031 where there are several.
        """
        if len(self._runners) == 1:
            return next(iter(self._runners.values()))
        message = f"{path} is called again behind its call, and it has been called with other adaptations since"
        raise GraftError("GC031", message, hint="checkpoint: layers in the spec computes activations again")


class _Part:
    """Refuses an attribute that is set during a call: the graph of the layer does not read it."""

    _graftc_path: str

    def __setattr__(self, name: str, value: Any) -> None:
        if _RUNNING.get(None) is not None and vars(self).get(name, _RUNNING) is not value:
            message = (
                f"the model's own Python sets {name} of {self._graftc_path}, which is a graph and does not read it"
            )
            hint = "compile with example inputs that show it: its maps are graphs then"
            raise GraftError("GC031", message, hint=hint)
        super().__setattr__(name, value)


class _Inside(_Part):
    """A module inside a layer that is a graph, as a class to put in front of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse a call that is not the layer's own."""
        message = f"{self._graftc_path} is called by itself, and the layer that it is in is one graph"
        raise GraftError("GC031", message, hint="compile with example inputs that call it so: its maps are graphs then")


class _Element(_Part):
    """A layer that is a graph, as a class to put in front of its own."""

    _graftc_ran: _Ran

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph gives."""
        runner = _RUNNING.get(None) or self._graftc_ran.only(self._graftc_path)
        module = cast(nn.Module, self)
        if _may_wait(runner, module, args, kwargs):
            call = partial(run_element, runner, module, args, kwargs)
            return deferred(call, cast(nn.Linear, module), args[0], self._graftc_path)
        return run_element(runner, module, args, kwargs)


class LiveRoot:
    """The source's own Python. It shares no module with the source, and all tensors with a Store.

    Args:
        source: the model that was compiled; it is not changed.
        elements: paths of its layers that are graphs.
    """

    def __init__(self, source: nn.Module, elements: Collection[str]) -> None:
        self.model: nn.Module = sharing_copy(source)
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
        self._own = OwnBuffers((path, module) for path, module in self._modules if id(module) not in self._inside)
        self._hooked: dict[tuple[str, str], set[int]] = {}

    @classmethod
    def of(cls, compilation: Compilation) -> LiveRoot | None:
        """The root of a compiled model; None where it is one graph."""
        if not is_live(compilation.model):
            return None
        return cls(compilation.source, elements_in(compilation.flags))

    def call(self, runner: GraphRunner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of a call, as the source model gives them.

        Args:
            runner: runs the layers.
            args, kwargs: of the call.
        """
        with self._running(runner):
            outputs = self.model(*args, **kwargs)
            self._warn_of_whole(runner, outputs)
            return outputs

    def _warn_of_whole(self, runner: GraphRunner, outputs: Any) -> None:
        """GC151, once, where the spec asks for a chunked loss and there is one that no head is in one graph with."""
        asked = runner.shown.compilation.spec.memory.loss == "chunked" and self.model.training
        if not asked or self._ran.chunked or self._warned:
            return
        loss = getattr(outputs, "loss", None)
        if isinstance(loss, Tensor) and loss.requires_grad:
            self._warned = True
            message = "the loss is computed as a whole: it is not a cross-entropy of what a linear map gives"
            warn("GC151", message, hint="leave out memory: {loss: chunked}")

    def generate(self, runner: GraphRunner, *args: Any, **kwargs: Any) -> Any:
        """What the source's own ``generate`` gives."""
        with self._running(runner):
            return cast(Any, self.model).generate(*args, **kwargs)

    @contextmanager
    def _running(self, runner: GraphRunner) -> Iterator[None]:
        """Inside, the layers are a Runner's graphs, and the tensors its Store's."""
        self._bind(runner)
        self._ran.note(runner)
        token = _RUNNING.set(runner)
        try:
            yield
        finally:
            _RUNNING.reset(token)
            if not _of_base(runner):
                self._own.keep(runner.store)

    def _bind(self, runner: GraphRunner) -> None:
        """Let the modules between graphs have the Store's tensors and modes, which may have moved and changed."""
        if is_unit(runner.module):
            message = "FSDP2 shards the modules of a graph, and between graphs this model is its own Python"
            raise GraftError("GC130", message, hint="replicate it with DistributedDataParallel")
        hooked = bool(self._hooked)
        for path, module in self._modules:
            prefix, held = f"{path}." if path else "", runner.store.nearest(path)
            vars(module)["training"] = held.training
            if path and (hooked or any(vars(held)[hooks] for hooks in CALL_HOOKS)):
                self._hook(path, module, held)
            for table in (module._parameters, *([module._buffers] if id(module) in self._inside else [])):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = runner.store.get(f"{prefix}{name}")
        self._own.bind(runner.store, base=_of_base(runner))

    def _hook(self, path: str, module: nn.Module, held: nn.Module) -> None:
        """Call the hooks of the compiled model's modules where the source's are, beside those that its class has.

        Raises:
            GraftError: GC043 for a hook on a module inside of a layer that is a graph.
        """
        if self._inside.get(id(module)) and any(vars(held)[hooks] for hooks in CALL_HOOKS):
            message = f"{path} has a hook, and the layer that it is in is one graph, which calls none"
            raise GraftError("GC043", message, hint="hook the layer, or hook the source model and compile that")
        for name in CALL_HOOKS:
            own, wanted = vars(module)[name], vars(held)[name]
            for number in self._hooked.pop((path, name), set()) - wanted.keys():
                own.pop(number, None)
            if wanted:
                own.update(wanted)
                self._hooked[path, name] = set(wanted)


def _put_in_front(stand_in: type, module: nn.Module, path: str) -> None:
    """Let a class be in front of a module's own."""
    cls = type(module)
    module.__class__ = type(cls.__name__, (stand_in, cls), {"__module__": __name__, "__doc__": cls.__doc__})
    vars(module)["_graftc_path"] = path


def _of_base(runner: GraphRunner) -> bool:
    """Whether the base alone is called: nothing that a model has updated counts then, and nothing is updated."""
    return bool(getattr(runner, "base_only", False))


def _may_wait(runner: GraphRunner, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call may be one of a head whose loss is made in chunks."""
    if runner.shown.compilation.spec.memory.loss == "whole" or not is_head(module):
        return False
    training = module.training and torch.is_grad_enabled() and not is_traced()
    watched = module._backward_hooks or module._backward_pre_hooks or torch._C._functorch.peek_interpreter_stack()
    return training and not watched and len(args) == 1 and not kwargs and isinstance(args[0], Tensor)


def run_element(
    runner: GraphRunner,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    steps: Sequence[FollowingCall] = (),
) -> Any:
    """What an element gives.

    Args:
        runner: whose graphs.
        module: the element in the live model.
        args, kwargs: as the source's layer is called.
        steps: what is done to the result in the same graph.

    Raises:
        GraftError: GC031 for a call that no graph can be made of.
    """
    path = str(module._graftc_path)
    if steps:
        vars(module)["_graftc_ran"].chunked = True
    structure, tensors = CallStructure.of(path, module, args, kwargs, steps)
    inputs = {input_name(path, index): tensor for index, tensor in enumerate(tensors)}
    signature = _find(runner, path, structure, inputs)
    if signature is None:
        with exclusive():
            signature = _find(runner, path, structure, inputs) or _add(runner, path, structure, tensors)
    key = runner.key(signature, runner.mode_of(signature))
    if not runner.shown.has(key):
        with exclusive():
            if not runner.shown.has(key):
                runner.install(key, runner.as_run(key))
    code: ElementCode = runner.shown.executables[key].known[ELEMENTS][path]
    results = code.run(runner.module, *(inputs[name] for name in code.inputs))
    made = code.outputs.build(results if isinstance(results, tuple | list) else (results,))
    if not structure.cached and not structure.tabled:
        return made
    if structure.cached:
        write_back(cache_among(args, kwargs), module, made["new"])
    put_into(tables_among(args, kwargs), made.get("put", {}))
    return made["result"]


ELEMENTS = "elements"
"""What the code of elements is known by."""


def _find(runner: GraphRunner, path: str, structure: CallStructure, inputs: Mapping[str, Tensor]) -> Signature | None:
    """The signature whose graphs hold for a call of an element."""
    compilation: Compilation = runner.shown.compilation
    for signature in compilation.signatures:
        base = compilation.program_as_run("train", "base", signature)
        if calls_in(base.flags).get(path) != structure:
            continue
        own = [spec for spec in base.inputs if spec.name in inputs]
        alike = all(_of_type(inputs[s.name], s.dtype) and inputs[s.name].dim() == len(s.shape) for s in own)
        if alike and len(own) == len(inputs) and fits(own, inputs):
            return signature
    return None


def _of_type(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a graph for a type takes a tensor."""
    return tensor.dtype == dtype or (dtype.is_floating_point and in_autocast(tensor))


def _add(runner: GraphRunner, path: str, structure: CallStructure, tensors: list[Tensor]) -> Signature:
    """Capture an element, and those of the same row, for a call of another kind than there has been.

    Raises:
        GraftError: GC031 where that cannot be captured.
    """
    compilation = runner.shown.compilation
    own = without_autocast(tensors, compilation.model.get_submodule(path))
    calls = {other: (structure, [tensor.clone() for tensor in own]) for other in _alike(compilation, path)}
    with torch.autocast(own[0].device.type if own else "cpu", enabled=False):
        return _captured(compilation, path, calls)


def _captured(compilation: Compilation, path: str, calls: Recorded) -> Signature:
    """The same, where autocast is off."""
    if reason := tried(compilation.model, {path: calls[path]}):
        message = f"{path} is called in a way that no graph can be made of: {reason}"
        raise GraftError("GC031", message, hint="compile with example inputs that call it so: its maps are graphs then")
    axes, flags = as_inputs(calls)
    try:
        with torch.enable_grad():
            return add_signature(compilation, axes, flags)
    except GraftError as error:
        if error.code != "GC030":
            raise
        message = f"{path} is called in a way that no graph can be made of: {error.message}"
        raise GraftError("GC031", message, hint=error.hint) from error


def _alike(compilation: Compilation, path: str) -> list[str]:
    """The elements of a row that the first signature calls as it does one of them, with sizes that are the same where
    they do not vary."""
    inputs = {spec.name: spec for spec in compilation.program_as_run("train", "base").inputs}

    def kind(other: str, structure: CallStructure) -> object:
        specs: list[InputSpec] = []
        while (name := input_name(other, len(specs))) in inputs:
            specs.append(inputs[name])
        fixed = [(spec.dtype, [size if isinstance(size, int) else 0 for size in spec.shape]) for spec in specs]
        return place_in_row(other), structure, fixed

    known = calls_in(compilation.flags)
    wanted = kind(path, known[path])
    if not compilation.model.get_submodule(path)._modules:
        return [path]
    return [other for other, structure in known.items() if kind(other, structure) == wanted]
