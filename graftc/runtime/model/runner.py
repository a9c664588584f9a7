"""Modules that run the Programs of a Compilation with the interface of the source model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from graftc.compiler.cached import gates_over_rows
from graftc.compiler.capture.interface import Interface, config_of, dtype_of
from graftc.compiler.capture.isolation import exclusive, is_traced
from graftc.compiler.capture.past import CACHE, with_cache
from graftc.compiler.capture.signature import split
from graftc.compiler.compilation import Compilation
from graftc.compiler.derived import FROM_FORWARD, entered, program_of
from graftc.compiler.folding.samples import remember
from graftc.compiler.pipeline import signature_for
from graftc.passes.core.ir.eval_mode import dropouts, silent
from graftc.passes.core.ir.functions import everywhere
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, Modes, ProgramKey, Signature
from graftc.passes.core.weights.containers import (
    OWN,
    Container,
    UnitCall,
    constant,
    drops_nothing,
    plain_attributes,
    require_types,
)
from graftc.passes.core.weights.names import module_of
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.cut import FLAG
from graftc.runtime.hooks.embeddings import install_embeddings
from graftc.runtime.hooks.layer_learning import LayerLearning
from graftc.runtime.model.base_model import install_base_model
from graftc.runtime.model.blocks import Root, Runner
from graftc.runtime.model.choosing import with_choices
from graftc.runtime.model.deferred import DefaultCache
from graftc.runtime.model.ecosystem import refuse_deepspeed, refuse_pickling
from graftc.runtime.model.generation import OF_GENERATING, Generating
from graftc.runtime.model.packing import warn_of_packed
from graftc.runtime.model.positioned import Positioned
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    from typing_extensions import TypeVar as DefaultingTypeVar

    M = DefaultingTypeVar("M", bound=nn.Module, default=Any, covariant=True)
else:
    M = TypeVar("M", bound=nn.Module, covariant=True)
"""The class of a source model; `Any` where nothing is known of it."""
Source = TypeVar("Source", bound=nn.Module)
"""The same, of an argument."""


class Published(Generic[P, R]):
    """A method of a Runner that its module has under the same name, whatever children the module has."""

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self.__wrapped__, self.__doc__, self.__name__ = method, method.__doc__, method.__name__

    def __get__(self, module: Root | None, owner: type[Root]) -> Callable[P, R]:
        return cast(Callable[P, R], self.__wrapped__ if module is None else getattr(module._graftc, self.__name__))


def runner_of(module: nn.Module | Runner) -> Any:
    """The Runner of a compiled or merged model. It has everything that graftc offers, also where a child of the source
    model has taken the name.

    Raises:
        GraftError: GC073 for anything else.
    """
    found = module if isinstance(module, Runner) else getattr(module, "__dict__", {}).get(OWN)
    if found is None:
        raise GraftError(
            "GC073", f"what was given is {kind_of(module)}, no compiled model", hint="give what graftc.compile returns"
        )
    return found


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Inside, a module is in eval mode; afterwards it and all below are in the modes that they were in."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


class ModelRoot(Root):
    """A module with the interface of a source model."""

    _graftc: ModelRunner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own outputs, as its class would give them."""
        return self._graftc.call(args, kwargs)

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`."""
        super().train(self._graftc.entering(mode))
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """See `torch.nn.Module`. An attribute that the source model has is a constant of the graphs (GC048)."""
        super().__setattr__(name, value)
        own = vars(self).get(OWN)
        if own is not None and name in own.constants and value != own.constants[name]:
            constant(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves between devices retarget the graphs; another dtype needs another capture."""
        runner = self._graftc
        moved = fn(torch.empty(0, dtype=runner.dtype, device=runner.device))
        if moved.dtype != runner.dtype:
            message = f"the graphs were captured in {runner.dtype} and cannot run in {moved.dtype}"
            raise GraftError("GC033", message, hint=f"load the base model in {moved.dtype} and compile that")
        require_types(self, fn)
        before = runner.device
        result = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if runner.device != before:
            runner.relower()
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A model with tensors of its own, the base's included; ties are kept. Graphs, which hold none, are shared, and
        so is the source model, which new signatures are captured from."""
        memo.update((id(item), item) for item in self._graftc.shared())
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        # What others have put in the place of forward calls this very model.
        vars(copied).update(copy.deepcopy({n: v for n, v in vars(self).items() if n != "forward"}, memo))
        copied._graftc.copied()
        return copied

    def __copy__(self) -> Self:
        """A second handle on the same tensors and graphs."""
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __getstate__(self) -> NoReturn:
        """Neither `pickle` nor `torch.save` takes a model: GC074 says what keeps one."""
        refuse_pickling(self)


class ModelRunner(Generating, DefaultCache, LayerLearning, Positioned):
    """A Runner with the interface of a source model: inputs by name or position, the model's own output class.

    Args:
        compilation: Programs, and the source model's interface.
        store: the tensors to run on.
    """

    config: Any

    def __init__(self, compilation: Compilation, store: Store) -> None:
        super().__init__(store)
        model = compilation.model
        self._compilation = self._active = compilation
        self._interface = Interface(model)
        self._dtype = dtype_of(model)
        self._looked_at: set[Signature] = set()
        self._entered = False
        self.constants = plain_attributes(model)
        names = self._interface.parameters
        self.main_input_name = getattr(model, "main_input_name", names[0] if names else "")
        if (config := config_of(model)) is not None:
            self.config = copy.deepcopy(config)
        own = (name for name in OF_GENERATING if hasattr(model, name) and name not in model._modules)
        vars(self).update(copy.deepcopy({name: getattr(model, name) for name in own}))

    def adopt(self, module: Root) -> None:
        """See `Runner.adopt`."""
        super().adopt(module)
        self._base_model = install_base_model(self._store, self._compilation.model, self.hidden)
        self._embeddings = install_embeddings(self._store, self._compilation.model, self._call_hooks)
        self._start_in_modes(module)

    def _call_hooks(self) -> None:
        """Make code that calls the hooks of the table of embeddings."""
        if self._hooked is None:
            self._hooked = self._embeddings
            try:
                self.relower()
            except GraftError:
                self._hooked = None
                self.relower()
                raise

    def _start_in_modes(self, module: Root) -> None:
        """Put every module into the mode of the source's."""
        module.train(self._compilation.model.training)
        for path, source in self._compilation.model.named_modules(remove_duplicate=False):
            if source.training != module.training:
                module.get_submodule(path).training = source.training

    def entering(self, mode: bool) -> bool:
        """The mode that the module is put into when one is asked for."""
        return mode

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, as transformers has it: called, it gives ``last_hidden_state``. The model itself
        where it has no head."""
        return self.module if self._base_model is None else self._base_model

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self._store_device()

    @property
    def dtype(self) -> torch.dtype:
        """Element type that the graphs were captured in."""
        return self._dtype

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of a call, as the source model gives them.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, GC143 for more tokens than there are positions.
        """
        if args and isinstance(args[0], UnitCall):
            self._entered = True
            try:
                return args[0].run()
            finally:
                self._entered = False
        return self._run(args, kwargs)

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The last hidden state of a call, ``[batch, sequence, hidden]``, without the head: ``last_hidden_state``
        of the source model's base model.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, and where the model returns no hidden states.
        """
        return self.within(lambda: self._run(args, kwargs, "hidden", **{FLAG: True}))

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry = "forward", **flags: Any) -> Any:
        chosen = {name: kwargs.pop(name) for name in self._active.controls if name in kwargs}
        named = self._interface.named(args, kwargs)
        present, plain = self._interface.read({**named, **flags})
        return self.run_read(named, present, chosen, plain, entry)

    def read_call(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What of a call's arguments makes a difference, as `ready` takes it.

        Raises:
            GraftError: GC031 for inputs that the model does not take.
        """
        chosen = {name: kwargs.pop(name) for name in self._active.controls if name in kwargs}
        present, _ = self._interface.read(self._interface.named((), kwargs))
        return with_choices(self._active, present, chosen) if self._active.controls else present

    def code_of(self, key: ProgramKey) -> Any:
        """The code that `run` runs under a key that is `ready`."""
        return self._roots[key]

    def run_part(self, present: dict[str, Any], plain: bool, entry: Entry = "forward") -> Any:
        """The outputs for tensors and flags by name."""
        past = present.get(CACHE)
        key = self.ready(present, entry)
        if not is_traced():
            self._look_at(key, present)
        results = self._results(key, present)
        outputs = self._lowered[key].outputs.build(results)
        if past is not None:
            outputs = with_cache(outputs, past.cache)
        return outputs.to_tuple() if plain and hasattr(outputs, "to_tuple") else outputs

    def _look_at(self, key: ProgramKey, present: Mapping[str, Any]) -> None:
        """Look at a call as far as its sizes and values say what is wrong with it, the first of its kind at all."""
        self.require_positions(key, present)
        if key.signature in self._looked_at:
            return
        refuse_deepspeed()
        self._looked_at.add(key.signature)
        remember(self._active, key.signature, present)
        resolved = self._active.places().resolved if key.stage == "adapted" else ()
        virtual = [item.name for item in resolved if item.spec.virtual_tokens()]
        warn_of_packed(present, virtual, partial(gates_over_rows, self._programs[key]))

    def _results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """Flat outputs of a call."""
        return self.run(key, present)

    def ready(self, present: Mapping[str, Any], entry: Entry = "forward") -> ProgramKey:
        """The key under which `run` has code for a call's tensors and flags; it is captured where it is missing.

        Raises:
            GraftError: GC031 where it cannot be.
        """
        signature = self._active.find(present)
        key = self.key(signature, self._mode(signature), entry) if signature is not None else None
        if key is None or key not in self._roots:
            if is_traced() and torch.compiler.is_exporting():
                tensors, flags = split(present)
                names = ", ".join([*tensors, *(name for name, _ in flags)])
                raise GraftError("GC031", f"{names} have no graph yet; call the model once before exporting it")
            return cast("ProgramKey", self._captured(present, entry))
        return key

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="a compiled model captures a call that is new: call it once before compiling it"
    )
    def _captured(self, present: Mapping[str, Any], entry: Entry) -> ProgramKey:
        """The key of a call that has no code yet, which `torch.compile` leaves to Python the first time."""
        with exclusive():
            signature = signature_for(self._active, present)
            key = self.key(signature, self._mode(signature), entry)
            if key not in self._roots:
                self.install(key, self._as_run(key))
        return key

    def _mode(self, signature: Signature) -> Modes:
        """The mode that the modules are in, where a dropout that was set to zero is in eval mode; code of
        `torch.compile` looks at that of the whole model, and at such dropouts once."""
        if is_traced():
            return (self._silent(signature) or "train") if self.training else "eval"
        modules = {path: self._store.nearest(path) for path in self._active.signatures[signature].moded}
        paths = modules.keys()
        off = {path for path, module in modules.items() if not module.training}
        if len(off) == len(paths) and not self.training:
            return "eval"
        zero = {silent(path) for path, module in modules.items() if module.training and drops_nothing(module)}
        return frozenset(off | zero) or "train"

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _silent(self, signature: Signature) -> frozenset[str]:
        """Paths of dropouts that were set to zero."""
        paths = self._active.signatures[signature].moded
        return frozenset(silent(path) for path in paths if drops_nothing(self._store.nearest(path)))

    def install(self, key: ProgramKey, program: Program) -> None:
        """See `Runner.install`. Dropouts of adaptations have modules that stand for them, for ``eval()`` and for
        whoever sets ``p`` to zero."""
        super().install(key, program)
        for path, p in everywhere(program.graph, dropouts(program)).items():
            parent, _, name = path.rpartition(".")
            holder = self._store.container(parent)
            if holder._modules.get(name) is None:
                training = self._store.owner(module_of(path)).training
                holder._modules[name] = Container.like(nn.Dropout(p)).train(training)

    def shared(self) -> list[Any]:
        """What a copy of the module has in common with it: Graphs, which hold no tensors, and the source model."""
        graphs = (*self._programs.values(), *self._lowered.values())
        found: list[Any] = [self._interface, *graphs, vars(self).get("_stand_in")]
        for compilation in self.compilations():
            if compilation.store is not self._store:
                found.append(compilation)
                continue
            found += [compilation.model, compilation.source, compilation.spec, compilation.known]
            found.append(compilation.table.first_call)
            found += [*compilation.table.programs.values(), *compilation.signatures.values()]
            places = [*compilation.places().resolved, *vars(compilation.main).get("resolved", ())]
            found += (site for r in places for site, _ in r.sites)
        return found

    def compilations(self) -> list[Compilation]:
        """Those that calls may run: the model's own."""
        return [self._compilation]

    def copied(self) -> None:
        """Called when the module has been copied, on the copy's Runner."""
        for name in ("_stand_in", "_adapter_tensors"):  # they are about the original
            vars(self).pop(name, None)

    def in_eval(self, inputs: Mapping[str, Tensor], entry: Entry = "forward") -> tuple[Any, ...]:
        """Flat outputs of the first signature in eval mode, whatever mode the model is in."""
        present, runner = self._as_at_first(inputs), self.complete()
        with in_eval_mode(self.module):
            return cast("tuple[Any, ...]", runner.run(runner.ready(present, entry), present))

    def signature_in_eval(self, inputs: Mapping[str, Tensor]) -> Signature:
        """The signature whose graph `in_eval` runs: other sizes than those of the first may have one of their own."""
        return signature_for(self._compilation, self._as_at_first(inputs))

    def _as_at_first(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """A call with the flags of the first signature and its usual choices."""
        main = self._compilation.program_as_run("train", "base")
        return with_choices(self._compilation, {**inputs, **dict(main.flags)}, {})

    def complete(self) -> Any:
        """A Runner that leaves no adaptation out: this one, where it leaves out none."""
        return self

    def within(self, run: Callable[[], Any]) -> Any:
        """Run something inside of a call of the module where that is sharded: its hooks gather the tensors. Other hooks
        are not told of calls that nobody made."""
        return self.module(UnitCall(run)) if is_unit(self.module) and not self._entered else run()

    def key(self, signature: Signature, mode: Modes, entry: Entry = "forward") -> ProgramKey:
        """The key of what a call runs."""
        return ProgramKey(entry, mode, signature)

    def _as_run(self, key: ProgramKey) -> Program:
        """The Program of a key, as code is made of it."""
        return self._program_of(key)

    def _program_of(self, key: ProgramKey) -> Program:
        if key.entry in FROM_FORWARD:
            return entered(key.entry, self._program_of(key._replace(entry="forward")))
        self._active.signatures[key.signature].add_constants(self._store)
        return program_of(self._active, key)
