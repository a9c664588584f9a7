"""A model in its capture state, and random numbers that do not depend on what was drawn before them.

This covers what is switched off, replaced and restored around a trace or a run. A model and its graph draw the same
random numbers.
"""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import fx, nn

from graftc.compat.hooks import FORWARD
from graftc.compat.modes import TorchDispatchMode
from graftc.compat.modules import BUFFERS, CHILDREN, PARAMETERS
from graftc.compiler.capture.as_traced import AsTraced
from graftc.compiler.capture.assignments import Attributes
from graftc.compiler.capture.interface import Flags, declared, is_transformers, parameters
from graftc.compiler.capture.past import ENCODER, assembled, has_encoder, taken_apart
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, tie_sizes
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir.eval_mode import dropout_probability
from graftc.passes.core.ir.program import is_random

aten = torch.ops.aten
_SEED = 20
_TABLES = (PARAMETERS, BUFFERS, CHILDREN, *FORWARD)


@contextmanager
def as_captured(request: CaptureRequest) -> Iterator[list[str]]:
    """Put a model into its capture state while the block runs, and yield notes on what was switched off.

    The model is in the requested mode, takes its inputs by name only, and runs without a cache and without random
    decisions made in Python. Its previous state is restored afterwards.

    Args:
        request: the model, its inputs and flags, and the mode.
    """
    model = request.model
    with as_before(model), torch.no_grad():
        model.train(request.mode == "train")
        notes = _without_random_structure(model)
        as_traced = AsTraced() if elements_in(request.flags) else nullcontext()
        with _without_state(model), _flat_forward(model, request.axes, request.flags), as_traced:
            yield notes


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Restore, after the block, everything that a forward pass or this module changes on the model.

    This covers attributes (training flags, values that layers remember), hooks (transformers installs some to record
    outputs) and configs (losses write to them).
    """
    modules = list(model.modules())
    attributes = [dict(vars(module)) for module in modules]
    containers = [Attributes(module) for module in modules]
    tables = [{name: dict(vars(module)[name]) for name in _TABLES} for module in modules]
    configs = _configs(model)
    settings = [dict(vars(config)) for config in configs]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # In eval mode, attention of torch.nn would take another path, which zeroes padded rows.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, values, kept, contents in zip(modules, attributes, tables, containers, strict=True):
            contents.restore()
            _restore(vars(module), values)
            for name in _TABLES:
                _restore(vars(module)[name], kept[name])
        for config, before in zip(configs, settings, strict=True):
            _restore(vars(config), before)


def _configs(model: nn.Module) -> list[Any]:
    """Return the configs of a model and of the models in it, each once; submodules may have copies of their own."""
    configs = {id(config): config for m in model.modules() if hasattr(config := getattr(m, "config", None), "to_dict")}
    return list(configs.values())


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    if now.keys() != before.keys() or any(now[name] is not value for name, value in before.items()):
        now.clear()
        now.update(before)


def _random_structure(model: nn.Module) -> Iterator[tuple[Any, str, Any, str]]:
    """Yield each setting by which Python code decides at random, in training, which layers run or what is masked.

    Each item is the setting's owner, its name, the value that switches it off, and a note.
    """
    for where, owner in [*model.named_modules(), *(("config", config) for config in _configs(model))]:
        attributes = vars(owner)
        for name in [name for name in attributes if name.endswith(("layerdrop", "apply_spec_augment"))]:
            value = attributes[name]
            if name.endswith("layerdrop") and isinstance(value, float) and value > 0:
                yield owner, name, 0.0, f"{name} of {where or 'the model'} is {value} and was captured as 0"
            elif name == "apply_spec_augment" and value is True:
                note = f"{name} is on and was captured as off: which inputs it masks is drawn outside the graph"
                yield owner, name, False, note


def random_structure(model: nn.Module) -> list[str]:
    """Return notes on what Python code decides at random in training, which is captured as switched off."""
    return list(dict.fromkeys(note for *_, note in _random_structure(model)))


def _without_random_structure(model: nn.Module) -> list[str]:
    """Switch off random decisions made in Python, and return notes on them."""
    switches = list(_random_structure(model))
    for owner, name, off, _ in switches:
        setattr(owner, name, off)
    return list(dict.fromkeys(note for *_, note in switches))


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Run the block with a model in eval mode that keeps no cache unless a call asks for one; restore it afterwards."""
    with as_before(model):
        model.eval()
        _switch_off_caches(model)
        yield


def _switch_off_caches(model: nn.Module) -> None:
    for config in _configs(model):
        if getattr(config, "use_cache", False):
            config.use_cache = False


@contextmanager
def _without_state(model: nn.Module) -> Iterator[None]:
    """Run the block with a model that remembers nothing between calls: no cache, and nothing derived from one."""
    with ExitStack() as stack:
        if is_transformers(model):
            from transformers.exporters import exporter_dynamo

            exporter: Any = exporter_dynamo
            stack.enter_context(exporter.reset_model_state(model))
            _switch_off_caches(model)
            for config in _configs(model):
                if getattr(config, "return_dict", True) is False:
                    config.return_dict = True
        yield


@contextmanager
def _flat_forward(model: nn.Module, axes: Sequence[Axis], flags: Flags) -> Iterator[None]:
    """Give ``forward`` a flat signature of the given inputs in the block, and tell the tracer which sizes are equal."""
    settings, original = dict(flags), model.forward
    alone = bool(settings.pop(ENCODER, False))
    called: Any = model.get_encoder() if alone else model  # type: ignore[operator]
    owned = "forward" in vars(model)
    before = vars(model).get("forward")
    names = parameters(called)
    positional = [n for n, p in declared(called).items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]

    def forward(**inputs: torch.Tensor) -> Any:
        tie_sizes(axes, inputs)
        given: dict[str, Any] = assembled({**inputs, **settings}, names, has_encoder(model))
        first = [given.pop(name) for name in positional if name in given]
        # The tracer takes a module's path from how it is reached while tracing.
        run: Any = model.get_encoder() if alone else original  # type: ignore[operator]
        return taken_apart(run(*first, **given))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(axis.name, kind, default=None) for axis in axes]
    )
    forward.__module__ = getattr(original, "__module__", __name__)
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if owned:
            vars(model)["forward"] = before
        else:
            del vars(model)["forward"]


def keeps_name(name: str) -> bool:
    """Return whether the tracer keeps the name of an input unchanged.

    It converts names to lower case, and numbers those that mean something in the code that it generates.
    """
    return name == name.lower() and fx.Graph().create_node("placeholder", name, name=name).name == name


def traced_names(inputs: Iterable[str]) -> dict[str, str]:
    """Return the tracer's name for each input: its own if the tracer keeps all of them, otherwise a numbered one."""
    names = list(inputs)
    if all(keeps_name(name) for name in names):
        return {name: name for name in names}
    return {name: f"input_{index}" for index, name in enumerate(names)}


@contextmanager
def standing_in(model: nn.Module, stand_ins: Mapping[str, str]) -> Iterator[None]:
    """Replace a model's forward by one with fewer inputs while the block runs; some are passed for others as well.

    Args:
        model: the model, in its capture state; its forward is restored afterwards.
        stand_ins: the names of the inputs that are left out, each with the name of the one passed in its place.
    """
    if not stand_ins:
        yield
        return
    every = inspect.signature(vars(model)["forward"]).parameters

    def made(called: Callable[..., Any]) -> Callable[..., Any]:
        def forward(**inputs: torch.Tensor) -> Any:
            given = ((name, stand_ins.get(name, name)) for name in every)
            return called(**{name: inputs[source] for name, source in given if source in inputs})

        return _with_signature(forward, called, [p for name, p in every.items() if name not in stand_ins])

    with wrapped(model, made):
        yield


@contextmanager
def wrapped(model: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of a model in its capture state by ``wrap(forward)`` while the block runs."""
    called = vars(model)["forward"]
    vars(model)["forward"] = wrap(called)
    try:
        yield
    finally:
        vars(model)["forward"] = called


def _with_signature(
    forward: Callable[..., Any], called: Callable[..., Any], parameters: Sequence[inspect.Parameter]
) -> Callable[..., Any]:
    forward.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    forward.__module__ = called.__module__
    return forward


@contextmanager
def renamed(model: nn.Module, traced: Mapping[str, str]) -> Iterator[None]:
    """Let the forward of a model in its capture state take its inputs under the tracer's names while the block runs."""
    originals = {given: name for name, given in traced.items()}
    if all(given == name for given, name in originals.items()):
        yield
        return

    def made(called: Callable[..., Any]) -> Callable[..., Any]:
        def forward(**inputs: torch.Tensor) -> Any:
            return called(**{originals[given]: value for given, value in inputs.items()})

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return _with_signature(forward, called, [inspect.Parameter(given, kind) for given in originals])

    with wrapped(model, made):
        yield


def draws(node: fx.Node) -> bool:
    """Return whether a node draws random numbers; attention does so if it applies dropout."""
    if node.target is aten.scaled_dot_product_attention.default:
        return dropout_probability(node) != 0
    return is_random(node)


class _EachFromTheSeed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode in which every draw starts from the same seed, so that earlier draws do not influence it.

    A graph contains only the draws that its outputs depend on.
    """

    def __init__(self, seed: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._seed()
        return func(*args, **(kwargs or {}))


@contextmanager
def same_draws(device: torch.device, wanted: bool) -> Iterator[None]:
    """Make random numbers depend on their kind and shape only while the block runs; restore random states afterwards.

    Args:
        device: the device on which they are drawn, in addition to the CPU.
        wanted: whether any draw matters for the results.
    """
    devices = [] if device.type == "cpu" else [device]
    module = torch.get_device_module(device)
    before = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None

    def seed() -> None:
        torch.default_generator.manual_seed(_SEED)
        if devices:
            module.manual_seed(_SEED)

    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        seed()
        random.seed(_SEED)
        if numpy is not None:
            numpy.random.seed(_SEED)
        try:
            if wanted:
                with _EachFromTheSeed(seed):
                    yield
            else:
                yield
        finally:
            random.setstate(before)
            if numpy is not None:
                numpy.random.set_state(numpy_state)
