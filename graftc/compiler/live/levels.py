"""Select the elements into which a model is split: its layers, and single maps where a layer cannot be captured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graftc.compat.modes import TorchDispatchMode
from graftc.compat.operators import LOCAL_SCALAR
from graftc.compiler.capture.anchor import anchor
from graftc.compiler.capture.as_captured import as_captured
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.capture_cache import Known
from graftc.compiler.capture.parameter_uses import observed
from graftc.compiler.capture.refusals import place_now, told
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.live.elements import Recorded, as_inputs, hold_all, layers_of, maps_of, place_in_row, union_of
from graftc.compiler.live.kinds import alone, captured_alone
from graftc.compiler.live.own_state import with_own_buffers
from graftc.compiler.live.run import RecordedRun, record
from graftc.passes.core.elements.calls import CallStructure
from graftc.passes.core.elements.decisions import Decisions, varying
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.ir.verify import record_baseline
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError, first_line


@dataclass(frozen=True)
class TakenApart:
    """The elements of a model.

    Attributes:
        calls: the calls to the elements in a run on the example inputs.
        by_parts: rows of layers that are split into parts, but not into maps, each with the reason for splitting.
        by_maps: rows of layers that are split into single maps as well, each with the reason for splitting.
        uncalled: rows of layers that the run did not call, so that nothing in them is an element.
        written: names of the buffers that the run wrote to.
        read: names of the parameters that the model's own Python code read between elements.
        captures: the captures of layers that were tried, by key.
    """

    calls: Recorded
    by_parts: Mapping[str, str]
    by_maps: Mapping[str, str]
    uncalled: tuple[str, ...]
    written: tuple[str, ...]
    read: tuple[str, ...]
    captures: Known


def taken_apart(
    model: nn.Module, run: Callable[[nn.Module], Any], *, maps_alone: bool = False, use_cache: bool = True
) -> TakenApart:
    """Take a model apart into elements, based on a run of it.

    Args:
        model: the model that is run; it is unchanged afterwards.
        run: a function that runs the model, for example with one call; it is called again for each depth at which
            layers or their parts cannot be graphs.
        maps_alone: whether only maps, and no layers or parts of layers, may be graphs.
        use_cache: whether to look up and store captures in the user's cache folder.

    Raises:
        GraftError: GC030 if the model does not run, or has no elements.
    """
    layers, maps = [] if maps_alone else layers_of(model), maps_of(model)
    seen = record(model, layers, maps, run)
    union, captures = union_of(with_own_buffers(model), [*layers, *maps]), dict[str, Callable[[], Capture | None]]()
    way = _Ways(union, captures, use_cache)
    graphs, reasons = way.whole(seen, layers)
    calls, read, whole = {**seen.calls, **graphs}, dict.fromkeys(seen.read), list(graphs)
    used = {*maps}.intersection(calls)
    map_counts = Counter(holder for path in used for holder in accumulate(path.split("."), "{}.{}".format))
    pending = _inside(model, {*layers} - {*graphs}, map_counts)
    while pending:
        # Layers that run as graphs are watched again, so that their reads do not count as reads between graphs.
        deeper = record(model, [*whole, *pending], maps, run)
        graphs, _ = way.whole(deeper, pending)
        calls, read = {**deeper.calls, **calls, **graphs}, read | dict.fromkeys(deeper.read)
        whole += graphs
        pending = _inside(model, {*pending} - {*graphs}, map_counts)
    inside = tuple(f"{path}." for path in whole)
    single = {p for p in maps if p in calls and p not in seen.entered and not p.startswith(inside)}
    one_of_each = {_kind(model, calls, path): path for path in single}
    reading = {kind for kind, p in one_of_each.items() if tried(union, {p: calls[p]})}
    chosen = [p for p in _in_order(calls) if p in whole or (p in single and _kind(model, calls, p) not in reading)]
    if not chosen:
        hint = "a layer is a module in a list, and a map a module with parameters; each must be called as a module"
        raise GraftError("GC030", f"{type(model).__name__} calls no layer and no map", hint=hint)
    rows: dict[str, list[str]] = defaultdict(list)
    for path in layers:
        rows[path.rpartition(".")[0]].append(path)
    by_maps = {row: why for row, why in reasons.items() if not hold_all(model, rows[row], whole)}
    return TakenApart(
        {path: calls[path] for path in chosen},
        {row: why for row, why in reasons.items() if row not in by_maps},
        by_maps,
        tuple(row for row in rows if not any(path.startswith(f"{row}.") for path in seen.calls)),
        seen.written,
        tuple(read),
        captures,
    )


class _Ways:
    """Finds out which layers, or parts of layers, can be graphs; those of the same kind share the answer.

    Args:
        union: the union of the model's elements, with buffers of its own.
        captures: to which the captures of layers are added, by key.
        use_cache: as for `taken_apart`.
    """

    def __init__(self, union: nn.Module, captures: dict[str, Callable[[], Capture | None]], use_cache: bool) -> None:
        self._union, self._captures, self._use_cache = union, captures, use_cache
        self._reasons: dict[object, str] = {}
        self._aliases = Store.mirror(union).aliases

    def whole(self, seen: RecordedRun, paths: Sequence[str]) -> tuple[Recorded, dict[str, str]]:
        """Return the calls to those that can be graphs, and the reasons why others cannot, by `place_in_row`.

        Args:
            seen: a run that called the layers or parts.
            paths: their paths.
        """
        reasons: dict[str, str] = {}
        calls: dict[str, tuple[CallStructure, Sequence[Tensor]]] = {}
        for path in filter(seen.calls.__contains__, paths):
            reason = seen.entered.get(path, "")
            if not reason:
                call: Recorded = {path: seen.calls[path]}
                if (reason := self._reason(path, call)).startswith(READS):
                    call = deciding(self._union, call)
                    reason = self._reason(path, call)
                calls |= call
            if reason:
                reasons.setdefault(place_in_row(path), reason)
        whole = {path: call for path, call in calls.items() if place_in_row(path) not in reasons}
        for path in filter(seen.untaken.__contains__, paths):
            reasons.setdefault(place_in_row(path), seen.untaken[path])
        return whole, reasons

    def _reason(self, path: str, call: Recorded) -> str:
        """Return why a layer cannot be a graph, or an empty string if it can."""
        kind = place_in_row(path), _kind(self._union, call, path)
        if kind not in self._reasons:
            self._reasons[kind] = self._in_the_way(path, call)
        return self._reasons[kind]

    def _in_the_way(self, path: str, call: Recorded) -> str:
        if reason := tried(self._union, call):
            return reason
        axes, flags = as_inputs(call)
        request = CaptureRequest(self._union, tuple(axes), flags, aliases=self._aliases)
        try:
            layer = captured_alone(request, path, self._captures, use_cache=self._use_cache)
        except GraftError as error:
            return told(error.__cause__ or error)
        if varying(layer.program):
            return f"{READS} that vary from call to call"
        baseline = record_baseline(layer.program)
        comparison = anchor(replace(request, model=alone(self._union, path)), baseline, layer.constants)
        if layer.key is not None:
            self._captures[layer.key] = layer.again
        if comparison.differing:
            return comparison.differing[0]
        return comparison.skipped if comparison.difference is None else ""


def _in_order(calls: Recorded) -> list[str]:
    """Return the paths of called modules, sorted by the first call to each module or to anything inside it."""
    first: dict[str, int] = {}
    for index, path in enumerate(calls):
        while path:
            first.setdefault(path, index)
            path = path.rpartition(".")[0]
    return sorted(calls, key=first.__getitem__)


def _inside(model: nn.Module, paths: Collection[str], counts: Mapping[str, int]) -> list[str]:
    """Return those direct submodules of some modules that each contain more than one called map.

    Args:
        model: the model.
        paths: paths of the outer modules.
        counts: number of called maps in each module, by path.
    """
    own = [(path, name) for path in paths for name, _ in model.get_submodule(path).named_children()]
    return sorted(inner for path, name in own if counts.get(inner := f"{path}.{name}", 0) > 1)


Kind = tuple[tuple[type, ...], str]
"""The classes of an element's modules, and the form of its call; apart from settings, these determine what its Python
code does."""


def _kind(model: nn.Module, calls: Recorded, path: str) -> Kind:
    return tuple(type(module) for module in model.get_submodule(path).modules()), calls[path][0].text


_MODES: tuple[Mode, ...] = ("train", "eval")
READS = "its Python reads the values of tensors"
"""The reason given for a layer whose Python code depends on tensor values."""


def deciding(union: nn.Module, call: Recorded) -> Recorded:
    """Run an element in each mode, and return its call with the decisions that its Python code bases on tensor values.

    Args:
        union: the union of the model's elements.
        call: the call to one element; decisions already in it are kept, and later ones follow from the values.
    """
    ((path, (structure, tensors)),) = call.items()
    union = with_own_buffers(alone(union, path))
    taken: dict[str, list[bool]] = {}
    for mode in _MODES:
        decisions = Decisions(structure.decisions(mode))
        with suppress(Exception):  # it needs other inputs in this mode, or is refused for another reason
            _run(union, {path: (structure.deciding({}), tensors)}, mode, decisions)
        taken[mode] = decisions.taken
    return {path: (structure.deciding(taken), tensors)}


def tried(union: nn.Module, call: Recorded) -> str:
    """Run an element in each mode, and return the reason why its Python code cannot be a graph; empty if none is found.

    Args:
        union: the union of the model's elements.
        call: the call to one element.
    """
    (path,) = call
    union = with_own_buffers(alone(union, path))
    for mode in _MODES:
        values = _ReadValues()
        try:
            with observed(values):
                _run(union, call, mode, _OfMemory(values))
        except GraftError as error:
            return error.message
        except Exception as error:
            return f"it does not run on its own: {first_line(error)}"
        if values.read:
            return f"{READS}, at {values.place}" if values.place else READS
    return ""


def _run(union: nn.Module, call: Recorded, mode: Mode, watching: AbstractContextManager[Any]) -> None:
    """Run an element on its own in a mode, within a context that observes its Python code."""
    axes, flags = as_inputs(call)
    request = CaptureRequest(union, tuple(axes), flags, mode)
    with as_captured(request), torch.random.fork_rng(devices=()), watching:
        union(**request.examples())


class _ReadValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that records whether Python code reads tensor values, whose consequences would be constant in a graph."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.read, self.place = False, ""

    def note(self) -> None:
        """Record that a value is read."""
        if not self.read:
            self.read, self.place = True, place_now()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _VALUES:
            self.note()
        return func(*args, **(kwargs or {}))


class _OfMemory(TorchFunctionMode):
    """A mode that records reads of a tensor's memory that do not call an operator."""

    def __init__(self, values: _ReadValues) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _OF_MEMORY:
            self._values.note()
        return func(*args, **(kwargs or {}))


_OF_MEMORY = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
_VALUES = (LOCAL_SCALAR, torch.ops.aten.is_nonzero.default)
