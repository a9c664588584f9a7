"""A call of one element of a live model: the graph that holds for it, made where there is none yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.signature import fits
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.elements import Recorded, as_inputs, in_autocast, mode_of, place_in_row, without_autocast
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

    def applies(self, adaptation: str) -> bool:
        """Whether calls run an adaptation."""


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
    call = _Call(runner, module, *CallStructure.of(path, module, args, kwargs, steps))
    if not (made := call.from_known()):
        with exclusive():
            made = call.from_known() or call.from_new()
    result, more = made
    if call.structure.cached:
        write_back(cache_among(args, kwargs), module, more["new"])
    if call.structure.tabled:
        put_into(tables_among(args, kwargs), more.get("put", {}))
    return result


Made = tuple[Any, Mapping[str, Any]]
"""What an element gives, and what comes out beside it."""


class _Call:
    """A call of an element.

    Args:
        runner: whose graphs.
        module: the element.
        structure: of the call.
        tensors: its tensors, in order.
    """

    def __init__(self, runner: GraphRunner, module: nn.Module, structure: CallStructure, tensors: list[Tensor]) -> None:
        self.structure = structure
        self._runner, self._module, self._tensors = runner, module, tensors
        self._path = str(module._graftc_path)
        self._inputs = {input_name(self._path, index): tensor for index, tensor in enumerate(tensors)}

    def from_known(self) -> Made | None:
        """Return the results of a known graph that is valid for the call, the last such one first; None without one."""
        holding = self._holding()
        if len(holding) > 1:
            holding.sort(key=lambda signature: signature != vars(self._module).get(_LAST))
        for signature in holding:
            made, _ = self._made(signature)
            if made is not None:
                vars(self._module)[_LAST] = signature
                return made
        return None

    def from_new(self) -> Made:
        """What a new graph gives.

        Raises:
            GraftError: GC031 where none can be made that holds for the call.
        """
        structure = self.structure
        for _ in range(_TRIES):
            signature, structure = self._add(structure)
            made, decided = self._made(signature)
            if made is not None:
                return made
            mode = mode_of(self._module)
            alike = zip(decided, structure.decisions(mode), strict=False)
            first = next(index for index, (own, taken) in enumerate(alike) if own != taken)
            structure = structure.deciding({mode: decided[: first + 1]})
        message = f"{self._path} decides by the values of tensors otherwise than the graph that was made for that"
        raise GraftError("GC031", message, hint="compile with example inputs that show it")

    def _holding(self) -> list[Signature]:
        """The signatures whose graphs are for a call of this kind, whatever it decides."""
        compilation: Compilation = self._runner.shown.compilation
        found = []
        for signature in compilation.signatures:
            base = compilation.program_as_run("train", "base", signature)
            structure = calls_in(base.flags).get(self._path)
            if structure is None or structure.undecided != self.structure:
                continue
            own = [spec for spec in base.inputs if spec.name in self._inputs]
            kinds = [(self._inputs[spec.name], spec) for spec in own]
            alike = all(_of_type(tensor, spec.dtype) and tensor.dim() == len(spec.shape) for tensor, spec in kinds)
            if alike and len(own) == len(self._inputs) and fits(own, self._inputs):
                found.append(signature)
                if not structure.decides:
                    break
        return found

    def _made(self, signature: Signature) -> tuple[Made | None, list[bool]]:
        """Run the graph of a signature; return its results and the call's decisions.

        The results are None where the graph is not valid for these decisions; its effects are undone then.
        """
        runner = self._runner
        key = runner.key(signature, runner.mode_of(signature))
        if not runner.shown.has(key):
            with exclusive():
                if not runner.shown.has(key):
                    runner.install(key, runner.as_run(key))
        executable = runner.shown.executables[key]
        code: ElementCode = executable.known[ELEMENTS][self._path]
        structure = calls_in(executable.program.flags)[self._path]
        taken = structure.decisions(mode_of(self._module))
        undo = self._undo(executable.once("updated", _updated)) if taken else None
        results = code.run(runner.module, *(self._inputs[name] for name in code.inputs))
        made = code.outputs.build(results if isinstance(results, tuple | list) else (results,))
        decided = torch.stack(made[DECIDED]).tolist() if taken and made[DECIDED] else []
        if undo is not None and decided != list(taken[: len(decided)]):
            undo()
            return None, decided
        return ((made["result"], made) if structure.boxed else (made, {})), decided

    def _undo(self, names: Iterable[str]) -> Callable[[], None]:
        """Return a function that restores tensors of the Store and the states of random generators as they are now.

        Args:
            names: of the tensors that the graph may write to.
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
        """Capture the element, and those of the same row, for a call of another kind than there has been.

        Args:
            structure: with decisions that are known.

        Raises:
            GraftError: GC031 where that cannot be captured.
        """
        compilation = self._runner.shown.compilation
        own = without_autocast(self._tensors, compilation.model.get_submodule(self._path))
        with torch.autocast(own[0].device.type if own else "cpu", enabled=False):
            call: Recorded = {self._path: (structure, own)}
            reason = tried(compilation.model, call)
            if reason.startswith(READS):
                call = deciding(self._now(), call)
                reason = tried(compilation.model, call)
            if reason:
                message = f"{self._path} is called in a way that no graph can be made of: {reason}"
                raise GraftError(
                    "GC031", message, hint="compile with example inputs that call it so: its maps are graphs then"
                )
            structure, _ = call[self._path]
            alike = {path: (structure, [each.clone() for each in own]) for path in _alike(compilation, self._path)}
            try:
                return _captured(compilation, self._path, alike), structure
            except GraftError as error:  # another of the row is not called so
                if error.code != "GC031" or len(alike) == 1:
                    raise
            return _captured(compilation, self._path, {self._path: alike[self._path]}), structure

    def _now(self) -> nn.Module:
        """The model with the values that buffers of the element have by now."""
        model = with_own_buffers(self._runner.shown.compilation.model)
        with torch.no_grad():
            for name, buffer in model.get_submodule(self._path).named_buffers():
                buffer.copy_(self._runner.store.get(f"{self._path}.{name}"))
        return model


_LAST = "_graftc_last"
"""The attribute of an element for the signature that held for its last call."""
_TRIES = 4


def _updated(program: Program) -> tuple[str, ...]:
    """Names of the Store's tensors that a Program writes to."""
    return tuple(updated(program.graph))


ELEMENTS = "elements"
"""What the code of elements is known by."""


def _of_type(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a graph for a type takes a tensor."""
    return tensor.dtype == dtype or (dtype.is_floating_point and in_autocast(tensor))


def _captured(compilation: Compilation, path: str, calls: Recorded) -> Signature:
    """Capture elements for calls of a new kind.

    Args:
        compilation: gets the signature.
        path: of the element that was called, for messages.
        calls: of it, and of those like it.

    Raises:
        GraftError: GC031 where that cannot be captured.
    """
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
    """Return the elements of a row that are of one class and that the first signature calls alike, with sizes that are
    the same where they do not vary."""
    model = compilation.model
    inputs = {spec.name: spec for spec in compilation.program_as_run("train", "base").inputs}

    def kind(other: str, structure: CallStructure) -> object:
        specs = [inputs[name] for name in input_names(other, inputs)]
        fixed = [(spec.dtype, [size if isinstance(size, int) else 0 for size in spec.shape]) for spec in specs]
        return place_in_row(other), type(model.get_submodule(other)), structure.undecided, fixed

    known = calls_in(compilation.flags)
    wanted = kind(path, known[path])
    if not model.get_submodule(path)._modules:
        return [path]
    return [other for other, structure in known.items() if kind(other, structure) == wanted]
