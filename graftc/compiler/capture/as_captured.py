"""Put a model into its capture state, and make random numbers independent of earlier draws.

Around a trace or a run, settings are switched off, replaced and restored. A model and its graph draw the same random
numbers.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graftc.compat.hooks import FORWARD
from graftc.compat.modes import TorchDispatchMode
from graftc.compat.modules import BUFFERS, CHILDREN, PARAMETERS
from graftc.compiler.capture.as_traced import AsTraced
from graftc.compiler.capture.assignments import Attributes, has_same_items
from graftc.compiler.capture.interface import Flags, declared, is_transformers, parameters
from graftc.compiler.capture.past import ENCODER, assembled, has_encoder, taken_apart
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, tie_sizes
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir.eval_mode import dropout_probability
from graftc.passes.core.ir.program import is_random

aten = torch.ops.aten
_SEED = 20
_ABSENT = object()
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
        notes = random_structure(model)
        for owner, name, off, _ in list(_random_structure(model)):
            setattr(owner, name, off)
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
    containers = [Attributes(module) for module in modules]
    tables = [vars(owner) for owner in (*modules, *_configs(model))]
    tables += [vars(module)[name] for module in modules for name in _TABLES]
    items = [dict(table) for table in tables]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # In eval mode, torch.nn attention would take another path, which zeroes padded rows.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for contents in containers:
            contents.restore()
        for table, before in zip(tables, items, strict=True):
            if not has_same_items(table, before):
                table.clear()
                table.update(before)


@contextmanager
def replaced(table: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """Replace one entry of a table, or add it, while the block runs; changes to other entries remain."""
    before = table.get(name, _ABSENT)
    table[name] = value
    try:
        yield
    finally:
        if before is _ABSENT:
            del table[name]
        else:
            table[name] = before


def _configs(model: nn.Module) -> list[Any]:
    """Return the configs of a model and of the models in it, each once; submodules may have copies of their own."""
    configs = {id(config): config for m in model.modules() if hasattr(config := getattr(m, "config", None), "to_dict")}
    return list(configs.values())


def _random_structure(model: nn.Module) -> Iterator[tuple[Any, str, Any, str]]:
    """Yield each setting that makes Python code decide at random, in training, which layers run or what is masked.

    Each item is the setting's owner, its name, the value that switches it off, and a note.
    """
    for where, owner in [*model.named_modules(), *(("config", config) for config in _configs(model))]:
        attributes = vars(owner)
        for name in [name for name in attributes if name.endswith(("layerdrop", "apply_spec_augment"))]:
            value = attributes[name]
            if name.endswith("layerdrop") and isinstance(value, float) and value > 0:
                yield owner, name, 0.0, f"{name} of {where or 'the model'} is {value} and was captured as 0"
            elif name == "apply_spec_augment" and value is True:
                note = f"{name} is on but was captured as off: what it masks is drawn at random outside the graph"
                yield owner, name, False, note


def random_structure(model: nn.Module) -> list[str]:
    """Return notes on random decisions that Python code makes in training, which are captured as switched off."""
    return list(dict.fromkeys(note for *_, note in _random_structure(model)))


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Run the block with a model in eval mode, without a cache unless a call requests one; then restore the model."""
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
    """Run the block with a model that stores nothing between calls: no cache, and nothing derived from one."""
    if not is_transformers(model):
        yield
        return
    from transformers.exporters import exporter_dynamo

    exporter: Any = exporter_dynamo
    with exporter.reset_model_state(model):
        _switch_off_caches(model)
        for config in _configs(model):
            if getattr(config, "return_dict", True) is False:
                config.return_dict = True
        yield


@contextmanager
def _flat_forward(model: nn.Module, axes: Sequence[Axis], flags: Flags) -> Iterator[None]:
    """Give ``forward`` a flat signature with these inputs for the block, and tell the tracer which sizes are equal."""
    settings, original = dict(flags), model.forward
    alone = bool(settings.pop(ENCODER, False))
    called: Any = model.get_encoder() if alone else model  # type: ignore[operator]
    names = parameters(called)
    positional = [n for n, p in declared(called).items() if p.kind is inspect.Parameter.POSITIONAL_ONLY]

    def forward(**inputs: torch.Tensor) -> Any:
        tie_sizes(axes, inputs)
        given: dict[str, Any] = assembled({**inputs, **settings}, names, has_encoder(model))
        first = [given.pop(name) for name in positional if name in given]
        # The tracer derives a module's path from how it is reached during tracing.
        run: Any = model.get_encoder() if alone else original  # type: ignore[operator]
        return taken_apart(run(*first, **given))

    module = getattr(original, "__module__", __name__)
    with replaced(vars(model), "forward", _taking(forward, [axis.name for axis in axes], module)):
        yield


def keeps_name(name: str) -> bool:
    """Return whether the tracer leaves the name of an input unchanged.

    It converts names to lower case, and appends numbers to those that have a meaning in the code that it generates.
    """
    return name == name.lower() and fx.Graph().create_node("placeholder", name, name=name).name == name


def traced_names(inputs: Iterable[str]) -> dict[str, str]:
    """Return the tracer's name for each input: the same if it leaves all names unchanged, otherwise a numbered one."""
    names = list(inputs)
    if all(keeps_name(name) for name in names):
        return {name: name for name in names}
    return {name: f"input_{index}" for index, name in enumerate(names)}


@contextmanager
def called_with(model: nn.Module, sources: Mapping[str, str]) -> Iterator[None]:
    """Replace a model's ``forward``, while the block runs, with one whose inputs may each stand in for several.

    Args:
        model: the model, in its capture state.
        sources: for each of the model's inputs, the name of the input that is passed for it.
    """
    called = vars(model)["forward"]

    def forward(**inputs: torch.Tensor) -> Any:
        return called(**{name: inputs[source] for name, source in sources.items() if source in inputs})

    with replaced(vars(model), "forward", _taking(forward, dict.fromkeys(sources.values()), called.__module__)):
        yield


def _taking(forward: Callable[..., Any], names: Iterable[str], module: str) -> Callable[..., Any]:
    """Give ``forward`` a signature with these input names, which the tracer needs, and return ``forward``."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=None) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    forward.__module__ = module
    return forward


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
    """Make random numbers depend only on their kind and shape while the block runs; restore random states afterwards.

    Args:
        device: the device on which they are drawn, in addition to the CPU.
        wanted: whether any draw matters for the results.
    """
    devices = [] if device.type == "cpu" else [device]
    module = torch.get_device_module(device)
    before, numpy_state = random.getstate(), np.random.get_state()

    def seed() -> None:
        torch.default_generator.manual_seed(_SEED)
        if devices:
            module.manual_seed(_SEED)

    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        seed()
        random.seed(_SEED)
        np.random.seed(_SEED)
        try:
            with _EachFromTheSeed(seed) if wanted else nullcontext():
                yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_state)
