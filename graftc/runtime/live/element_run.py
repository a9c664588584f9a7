"""Calls to a live model's elements: each call runs a graph that is valid for it, or captures a new one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftc.compat.modules import children_of
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.elements import Recorded, as_inputs, mode_of, place_in_row, without_autocast
from graftc.compiler.live.levels import READS, deciding, tried
from graftc.compiler.live.own_state import copies, with_own_buffers
from graftc.compiler.signatures import add_signature
from graftc.passes.core.elements.behind import FollowingCall
from graftc.passes.core.elements.calls import CallStructure, calls_in, input_name, input_names
from graftc.passes.core.elements.decisions import DECIDED
from graftc.passes.core.elements.layer_cache import cache_among, write_back
from graftc.passes.core.elements.tables import put_into, tables_among
from graftc.passes.core.ir.effects import updated
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Modes, ProgramKey, Signature
from graftc.passes.core.weights.store import Store
from graftc.runtime.live.element_code import ElementCode
from graftc.specs.errors.diagnostics import GraftError


class GraphRunner(Protocol):
    """Protocol for a Runner of graphs; see `graftc.runtime.model.model_runner.ModelRunner`."""

    store: Store
    shown: Any

    @property
    def module(self) -> nn.Module:
        """The root of the tree of tensors."""

    def key(self, signature: Signature, mode: Modes) -> ProgramKey:
        """Return the key of the Program that a call runs."""

    def mode_of(self, signature: Signature) -> Modes:
        """Return the mode of a call."""

    def as_run(self, key: ProgramKey) -> Program:
        """Return the Program of a key in the form from which code is generated."""

    def install(self, key: ProgramKey, program: Program) -> None:
        """Generate the code of a Program."""

    def applies(self, adaptation: str) -> bool:
        """Return whether calls run an adaptation."""


def run_element(
    runner: GraphRunner,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    steps: Sequence[FollowingCall] = (),
) -> Any:
    """Return the results of an element.

    Args:
        runner: the Runner whose graphs are run.
        module: the element in the live model.
        args, kwargs: the arguments, as passed to the source's layer.
        steps: steps to apply to the result in the same graph.

    Raises:
        GraftError: GC031 for a call that cannot be captured.
    """
    path = str(module._graftc_path)
    if steps:
        vars(module)["_graftc_ran"].chunked = True
    call = _Call(runner, module, *CallStructure.of(path, module, args, kwargs, steps))
    if not (outcome := call.from_known()):
        with exclusive():
            outcome = call.from_known() or call.from_new()
    result, more = outcome
    if call.structure.cached:
        write_back(cache_among(args, kwargs), module, more["new"])
    if call.structure.tabled:
        put_into(tables_among(args, kwargs), more.get("put", {}))
    return result


Outcome = tuple[Any, Mapping[str, Any]]
"""The results of an element, and the other outputs of its graph."""


class _Call:
    """A call to an element.

    Args:
        runner: the Runner whose graphs are run.
        module: the element.
        structure: the structure of the call.
        tensors: the tensors of the call, in order.
    """

    def __init__(self, runner: GraphRunner, module: nn.Module, structure: CallStructure, tensors: list[Tensor]) -> None:
        self.structure = structure
        self._runner, self._module, self._tensors = runner, module, tensors
        self._path = str(module._graftc_path)
        self._inputs = {input_name(self._path, index): tensor for index, tensor in enumerate(tensors)}

    def from_known(self) -> Outcome | None:
        """Return the results of an existing graph that is valid for the call; None if there is no such graph.

        The graph that was valid for the element's last call is tried first.
        """
        shown = self._runner.shown
        served = [
            each for each in shown.served.of(shown.compilation, self._path, self.structure) if each.fits(self._tensors)
        ]
        if len(served) > 1:
            served.sort(key=lambda each: each.signature != vars(self._module).get(_LAST))
        for each in served:
            outcome, _ = self._outcome(each.signature, each.structure)
            if outcome is not None:
                vars(self._module)[_LAST] = each.signature
                return outcome
        return None

    def from_new(self) -> Outcome:
        """Return the results of a new graph.

        Raises:
            GraftError: GC031 if no graph that is valid for the call can be captured.
        """
        structure = self.structure
        for _ in range(_TRIES):
            signature, structure = self._add(structure)
            outcome, decided = self._outcome(signature, structure)
            if outcome is not None:
                return outcome
            mode = mode_of(self._module)
            alike = zip(decided, structure.decisions(mode), strict=False)
            first = next(index for index, (own, taken) in enumerate(alike) if own != taken)
            structure = structure.deciding({mode: decided[: first + 1]})
        message = f"{self._path} decides by the values of tensors, and graphs captured for its decisions do not match"
        raise GraftError("GC031", message, hint="compile with example inputs that lead to these decisions")

    def _outcome(self, signature: Signature, structure: CallStructure) -> tuple[Outcome | None, list[bool]]:
        """Run the graph of a signature, in which the call has this structure; return its results and decisions.

        If the graph is not valid for these decisions, the results are None and the graph's effects are undone.
        """
        runner = self._runner
        key = vars(self._module)["_graftc_ran"].key(runner, signature)
        if not runner.shown.has(key):
            with exclusive():
                if not runner.shown.has(key):
                    runner.install(key, runner.as_run(key))
        executable = runner.shown.executables[key]
        code: ElementCode = executable.known[ELEMENTS][self._path]
        taken = structure.decisions(mode_of(self._module))
        undo = self._undo(executable.once("updated", lambda program: tuple(updated(program.graph)))) if taken else None
        results = code.run(runner.module, *(self._inputs[name] for name in code.inputs))
        outputs = code.outputs.build(results if isinstance(results, tuple | list) else (results,))
        decided = torch.stack(outputs[DECIDED]).tolist() if taken and outputs[DECIDED] else []
        if undo is not None and decided != list(taken[: len(decided)]):
            undo()
            return None, decided
        return ((outputs["result"], outputs) if structure.boxed else (outputs, {})), decided

    def _undo(self, names: Iterable[str]) -> Callable[[], None]:
        """Return a function that restores the current values of tensors and the states of random number generators.

        Args:
            names: the names of the Store's tensors that the graph may write to.
        """
        written = [self._runner.store.get(name) for name in names]
        before, devices = copies(written), {tensor.device for tensor in self._tensors if tensor.device.type == "cuda"}
        states = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}

        def undo() -> None:
            with torch.no_grad():
                for tensor, value in zip(written, before, strict=True):
                    tensor.copy_(value)
            torch.set_rng_state(states[0])
            for device, state in states[1].items():
                torch.cuda.set_rng_state(state, device)

        return undo

    def _add(self, structure: CallStructure) -> tuple[Signature, CallStructure]:
        """Capture the element, and the similar elements of its row, for a new kind of call.

        Args:
            structure: the structure of the call, with the decisions that are known.

        Raises:
            GraftError: GC031 if the call cannot be captured.
        """
        compilation = self._runner.shown.compilation
        tensors = without_autocast(self._tensors, compilation.model.get_submodule(self._path))
        with torch.autocast(tensors[0].device.type if tensors else "cpu", enabled=False):
            call: Recorded = {self._path: (structure, tensors)}
            reason = tried(compilation.model, call)
            if reason.startswith(READS):
                call = deciding(self._now(), call)
                reason = tried(compilation.model, call)
            if reason:
                message = f"{self._path} is called in a way that cannot be captured as a graph: {reason}"
                raise GraftError(
                    "GC031",
                    message,
                    hint="compile with example inputs that call it this way: each map then becomes a graph",
                )
            structure, _ = call[self._path]
            alike = {path: (structure, [each.clone() for each in tensors]) for path in _alike(compilation, self._path)}
            try:
                return _captured(compilation, self._path, alike), structure
            except GraftError as error:  # another element of the row is not called in this way
                if error.code != "GC031" or len(alike) == 1:
                    raise
            return _captured(compilation, self._path, {self._path: alike[self._path]}), structure

    def _now(self) -> nn.Module:
        """Return the model with the current values of the element's buffers."""
        model = with_own_buffers(self._runner.shown.compilation.model)
        with torch.no_grad():
            for name, buffer in model.get_submodule(self._path).named_buffers():
                buffer.copy_(self._runner.store.get(f"{self._path}.{name}"))
        return model


_LAST = "_graftc_last"
"""The attribute in which an element stores the signature that was valid for its last call."""
_TRIES = 4


ELEMENTS = "elements"
"""The key of the elements' code in an executable's `known`."""


def _captured(compilation: Compilation, path: str, calls: Recorded) -> Signature:
    """Capture elements for a new kind of call, and return the new signature.

    Args:
        compilation: the Compilation to which the signature is added.
        path: the path of the element that was called, for messages.
        calls: the calls to that element and to similar ones.

    Raises:
        GraftError: GC031 if they cannot be captured.
    """
    axes, flags = as_inputs(calls)
    try:
        with torch.enable_grad():
            return add_signature(compilation, axes, flags)
    except GraftError as error:
        if error.code != "GC030":
            raise
        message = f"{path} is called in a way that cannot be captured as a graph: {error.message}"
        raise GraftError("GC031", message, hint=error.hint) from error


def _alike(compilation: Compilation, path: str) -> list[str]:
    """Return the elements of the same row that have the same class and are called alike in the first signature.

    The static sizes of their inputs are equal as well.
    """
    model = compilation.model
    inputs = {spec.name: spec for spec in compilation.program_as_run("train", "base").inputs}

    def kind(other: str, structure: CallStructure) -> object:
        specs = [inputs[name] for name in input_names(other, inputs)]
        fixed = [(spec.dtype, [size if isinstance(size, int) else 0 for size in spec.shape]) for spec in specs]
        return place_in_row(other), type(model.get_submodule(other)), structure.undecided, fixed

    known = calls_in(compilation.flags)
    wanted = kind(path, known[path])
    if not children_of(model.get_submodule(path)):
        return [path]
    return [other for other, structure in known.items() if kind(other, structure) == wanted]
