"""A Runner with a source model's interface."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn

from graftc.compat.hooks import forward_hooks
from graftc.compat.modules import children_of
from graftc.compat.tensors import version_of
from graftc.compiler.capture.interface import Interface, config_of, dtype_of
from graftc.compiler.capture.isolation import exclusive, is_traced, seldom_collected
from graftc.compiler.capture.past import CACHE, USE_CACHE, with_cache
from graftc.compiler.compilation import Compilation
from graftc.compiler.derived import FROM_FORWARD, entered
from graftc.compiler.derived import program_of as derived_program
from graftc.compiler.folding.samples import remember
from graftc.compiler.input_checks import require
from graftc.compiler.partial_graphs import cannot_be_cached, gates_over_rows
from graftc.compiler.positions import PositionTable, position_tables
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.codegen import executable_of
from graftc.passes.core.ir.eval_mode import dropouts, silent
from graftc.passes.core.ir.functions import everywhere
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, Modes, ProgramKey, Signature
from graftc.passes.core.weights.containers import (
    Container,
    UnitCall,
    drops_nothing,
    plain_attributes,
)
from graftc.passes.core.weights.names import module_of
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.cut import FLAG
from graftc.runtime.hooks.embeddings import install_embeddings
from graftc.runtime.hooks.layer_calls import hooks_everywhere
from graftc.runtime.invocations import remember_starts, warn_of_invocations
from graftc.runtime.live.element_code import ElementCode, parts_of
from graftc.runtime.live.element_run import ELEMENTS
from graftc.runtime.live.live_root import LiveRoot
from graftc.runtime.model.base_model import install_base_model
from graftc.runtime.model.choices import held, with_choices
from graftc.runtime.model.deferred import CallState, cache_field, deferred_cache, may_return_cache, not_at_once
from graftc.runtime.model.libraries import copies_of, refuse_deepspeed
from graftc.runtime.model.past import read_past, tokens_of
from graftc.runtime.model.root import AdaptedView, Root, Runner, Value
from graftc.runtime.packed_batches import warn_of_packed
from graftc.specs.errors.diagnostics import GraftError

OF_GENERATING = ("generation_config", "input_modalities", "output_modalities")
"""Attributes of a source model that are copied to a compiled model."""


class ModelRunner(Runner):
    """A Runner with a source model's interface: inputs by name or position, and the model's own output class.

    Args:
        compilation: the Programs and the source model's interface.
        store: the tensors to run on.

    Attributes:
        compilation: as passed in.
        interface: the source model's interface.
        derived: values computed from the current Compilation, by name.
        base_only: whether calls run the base's graphs.
    """

    config: Any
    base_only = False

    def __init__(self, compilation: Compilation, store: Store) -> None:
        super().__init__(compilation, store)
        model = compilation.model
        self.compilation = compilation
        self.live = LiveRoot.of(compilation, store)
        self.hearing.live = self.live is not None
        self.interface = Interface(model if self.live is None else compilation.source)
        self.derived: dict[Any, Any] = {}
        self._dtype = dtype_of(model)
        self._looked_at: set[Signature] = set()
        self.constants = plain_attributes(model)
        names = self.interface.parameters
        self.main_input_name = getattr(model, "main_input_name", names[0] if names else "")
        if (config := config_of(model)) is not None:
            self.config = copy.deepcopy(config)
        vars(self).update(copies_of(model, OF_GENERATING))

    def adopt(self, module: Root) -> None:
        """Make a module the root of the tree, with a callable base model, hooks, and the source's modes."""
        super().adopt(module)
        self._base_model = install_base_model(self.store, self.compilation.model, self.hidden)
        self._embeddings = install_embeddings(self.store, self.compilation.model, self._call_hooks)
        self.listen()
        self._start_in_modes(module)

    def _call_hooks(self) -> None:
        """Generate code that calls the embedding table's hooks."""
        if self.hooked is None:
            self.hooked = self._embeddings
            try:
                self.relower()
            except GraftError:
                self.hooked = None
                self.relower()
                raise

    def _start_in_modes(self, module: Root) -> None:
        """Put every module into the mode of its source module."""
        module.train(self.compilation.model.training)
        for path, source in self.compilation.model.named_modules(remove_duplicate=False):
            if source.training != module.training:
                module.get_submodule(path).training = source.training

    def entering(self, mode: bool) -> bool:
        """Return the mode to set on the module when ``mode`` is requested."""
        return mode

    @property
    def base_model(self) -> nn.Module:
        """The model without its head, as in transformers; calling it returns ``last_hidden_state``.

        If the model has no head, this is the model itself.
        """
        return self.module if self._base_model is None else self._base_model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the graphs were captured."""
        return self._dtype

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a call, in the source model's form.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, GC143 for more tokens than there are positions.
        """
        if args and isinstance(args[0], UnitCall):
            self.entered = True
            try:
                return args[0].run()
            finally:
                self.entered = False
        return self.respond(args, kwargs)

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the last hidden state of a call, ``[batch, sequence, hidden]``, without running the head.

        It is the ``last_hidden_state`` of the source model's base model.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, and if the model returns no hidden states.
        """
        return self.within(lambda: self.respond(args, kwargs, "hidden", **{FLAG: True}))

    def respond(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry = "forward", **flags: Any) -> Any:
        """Return the outputs of a call through a given entry."""
        if self.live is not None:
            return self.live.call(self, args, kwargs)
        chosen = {name: kwargs.pop(name) for name in self.shown.compilation.controls if name in kwargs}
        named = self.interface.named(args, kwargs)
        present, plain = self.interface.read({**named, **flags})
        config = getattr(self, "config", None)
        usual = entry == "forward" and not is_traced()
        if usual and may_return_cache(self.interface, config, named, present, self.training):
            heard = self.hearing.hooked or hooks_everywhere()
            if not heard or not self._can_return_cache() or tokens_of(self.shown.compilation, present) is None:
                return self._with_cache_to_come(present, chosen, plain)
            present[USE_CACHE] = True
        return self._chosen(present, chosen, plain, entry)

    def _chosen(self, present: dict[str, Any], chosen: Mapping[str, Any], plain: bool, entry: Entry = "forward") -> Any:
        """Return the outputs for a call's inputs and its choices among adaptations, as the caller passed them."""
        if USE_CACHE in present:
            read_past(self.shown.compilation, present, self.begins)
        compilation = self.shown.compilation
        if not compilation.controls:
            return self.run_part(present, plain, entry)
        adapted = not self.base_only
        if is_traced():
            return self.run_part(with_choices(compilation, present, chosen, adapted=adapted), plain, entry)
        with held(compilation, chosen) as numbers:
            present = with_choices(compilation, present, numbers, adapted=adapted)
            outputs = self.run_part(present, plain, entry)
        if adapted:
            remember_starts(compilation, present)
        return outputs

    @property
    def begins(self) -> int:
        """The position of a text's first token, which adaptations may precede."""
        return 0

    def _can_return_cache(self) -> bool:
        """Return whether the model has a cache of keys and values that no adaptation rules out."""
        return self.keeps_cache() and not cannot_be_cached(self.shown.compilation)

    def keeps_cache(self) -> bool:
        """Return whether the source model has a cache of keys and values; the answer is stored."""
        if (known := self.shown.compilation.known_to_keep_cache) is None:
            with exclusive():
                known = self.shown.compilation.keeps_cache
        return known

    def _with_cache_to_come(self, present: dict[str, Any], chosen: Mapping[str, Any], plain: bool) -> Any:
        """Return the outputs of a call, with a cache that is created when it is first used."""
        call = CallState.of({**present, **chosen}, self._written, self.shown.device_type)
        outputs = self._chosen(dict(present), chosen, False)
        field = cache_field(outputs)
        if field is not None and self.keeps_cache():
            again: ModelRunner = copy.copy(self)  # not affected by what later calls leave out
            inputs = {name: call.inputs[name] for name in present}
            choice = {name: call.inputs[name] for name in chosen}

            def make() -> Any:
                if is_unit(self.module):
                    raise not_at_once("all processes of a sharded model have to create a cache together")
                if again.training:
                    raise not_at_once(
                        "a call's cache is created when it is first used, but the model is in train mode by now"
                    )
                with call.again():
                    return again._chosen({**inputs, USE_CACHE: True}, choice, False)[field]

            deferred = deferred_cache(self.shown.compilation.cache_layout.pairs, make)
            outputs = type(outputs)(**{**outputs, field: deferred})
        return outputs.to_tuple() if plain and hasattr(outputs, "to_tuple") else outputs

    def _written(self) -> tuple[Any, ...]:
        """Return a value that changes with the adaptations, their tensors, and the hooks on the embedding table."""
        key = id(self.compilation), self.shown.device_type
        tensors = self.once("adapters", lambda: [tensor for _, tensor in self.store.adapters()], of=key)
        table = self.module.get_submodule(self.hooked) if self.hooked is not None else None
        hooks = () if table is None else tuple(forward_hooks(table))
        return (*key, hooks, sum(map(version_of, tensors)))

    def run_part(self, present: dict[str, Any], plain: bool, entry: Entry = "forward") -> Any:
        """Return the outputs for tensors and flags, given by name."""
        past = present.get(CACHE)
        key = self.ready(present, entry)
        if not is_traced():
            self._look_at(key, present)
        outputs = self.shown.lowered_of(key).outputs.build(self.results(key, present))
        if past is not None:
            tokens = tokens_of(self.shown.compilation, present)
            outputs = with_cache(outputs, past, 0 if tokens is None else tokens.shape[1])
        return outputs.to_tuple() if plain and hasattr(outputs, "to_tuple") else outputs

    def _look_at(self, key: ProgramKey, present: Mapping[str, Any]) -> None:
        """Check a call's positions and values; check the first call with each signature further, and remember it.

        Raises:
            GraftError: GC143 for more tokens than there are positions.
        """
        for table in self.position_tables(key):
            table.require(present, self.store)
        if self.device.type != "meta":
            require(self.shown.executables[key].program.checks, present, self.store)
        if key.signature in self._looked_at:
            return
        refuse_deepspeed()
        self._looked_at.add(key.signature)
        remember(self.shown.compilation, key.signature, present)
        if key.stage == "adapted":
            warn_of_invocations(self.shown.compilation, present)
        resolved = self.shown.compilation.places().resolved if key.stage == "adapted" else ()
        virtual = [item.name for item in resolved if item.spec.virtual_tokens()]
        warn_of_packed(present, virtual, partial(gates_over_rows, self.shown.executables[key].program))

    def position_tables(self, key: ProgramKey) -> tuple[PositionTable, ...]:
        """Return the tables that a Program reads at token positions.

        On the meta device the result is empty, since no values could be checked.
        """
        if self.device.type == "meta":
            return ()
        if key not in self.shown.executables:
            programs = self.shown.compilation.table.programs
            return self.once((self.shown.label, key), lambda: position_tables(programs[key], self.store))
        return self.shown.executables[key].once("positions", lambda program: position_tables(program, self.store))

    def once(self, name: Hashable, make: Callable[[], Value], *, of: object = None) -> Value:
        """Return a value derived from the current Compilation, computed when it is first requested.

        Args:
            name: the name of the value.
            make: a function that computes the value.
            of: anything else on which the value depends; the value is computed again when this changes.
        """
        known = self.derived.get(name)
        if known is None or known[0] != of:
            known = self.derived[name] = of, make()
        return cast(Value, known[1])

    def results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the flat outputs of a call."""
        return self.run(key, present)

    def ready(self, present: Mapping[str, Any], entry: Entry = "forward") -> ProgramKey:
        """Return the key under which `run` has code for a call's tensors and flags, after capturing it if necessary.

        Raises:
            GraftError: GC031 if the call cannot be captured.
        """
        signature = self.shown.compilation.find(present)
        key = self.key(signature, self.mode_of(signature), entry) if signature is not None else None
        if key is None or not self.shown.has(key):
            if is_traced() and torch.compiler.is_exporting():
                message = f"no graph yet for the inputs {', '.join(present)}; call the model once before exporting it"
                raise GraftError("GC031", message)
            return cast("ProgramKey", self._captured(present, entry))
        return key

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="a compiled model captures every new kind of call: make the call once before compiling the model"
    )
    def _captured(self, present: Mapping[str, Any], entry: Entry) -> ProgramKey:
        """Capture a call that has no code yet and return its key.

        Code compiled by `torch.compile` falls back to Python for the first call of each kind.
        """
        with exclusive(), seldom_collected():
            signature = signature_for(self.shown.compilation, present)
            key = self.key(signature, self.mode_of(signature), entry)
            if not self.shown.has(key):
                self.install(key, self.as_run(key))
        return key

    def run_above(self, key: ProgramKey, graph: fx.Graph) -> None:
        """Generate the code that calls the layers; in a live model, also generate code for each element."""
        super().run_above(key, graph)
        if self.live is None:
            return
        codes: dict[str, ElementCode] = {}
        for path, (part, outputs) in parts_of(self.shown.lowered_of(key), graph).items():
            names = tuple(str(node.target) for node in part.find_nodes(op="placeholder"))
            run = self.code(key, part, self.module, executable_of(part, self._code_device()))
            codes[path] = ElementCode(names, run, outputs)
        self.shown.executables[key].known[ELEMENTS] = codes

    def mode_of(self, signature: Signature) -> Modes:
        """Return the mode of the modules; a dropout whose ``p`` was set to zero counts as being in eval mode.

        Code compiled by `torch.compile` reads the mode of the whole model, and checks for such dropouts only once.
        """
        if is_traced():
            return (self._silent(signature) or "train") if self.training else "eval"
        modules = {path: self.store.nearest(path) for path in self.shown.compilation.signatures[signature].moded}
        paths = modules.keys()
        off = {path for path, module in modules.items() if not module.training}
        if len(off) == len(paths) and not self.training:
            return "eval"
        zero = {silent(path) for path, module in modules.items() if module.training and drops_nothing(module)}
        return frozenset(off | zero) or "train"

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def _silent(self, signature: Signature) -> frozenset[str]:
        """Return the paths of dropouts whose ``p`` was set to zero."""
        paths = self.shown.compilation.signatures[signature].moded
        return frozenset(silent(path) for path in paths if drops_nothing(self.store.nearest(path)))

    def install(self, key: ProgramKey, program: Program) -> None:
        """Lower a Program to code.

        The dropouts of adaptations get modules, so that calling ``eval()`` or setting ``p`` to zero affects them.
        """
        super().install(key, program)
        for path, p in everywhere(program.graph, dropouts(program)).items():
            parent, _, name = path.rpartition(".")
            holder = self.store.container(parent)
            if children_of(holder).get(name) is None:
                training = self.store.owner(module_of(path)).training
                children_of(holder)[name] = Container.like(nn.Dropout(p)).train(training)

    def shared(self) -> list[Any]:
        """Return the objects that a copy of the module shares with it: graphs, which own no tensors, and the source."""
        executables = [executable for view in self.every_view() for executable in view.executables.values()]
        graphs = [graph for each in executables for graph in (each.program, each.lowered)]
        items: list[Any] = [self.interface, *graphs, self.derived, self.live]
        for compilation in self.compilations():
            if compilation.store is not self.store:
                items.append(compilation)
                continue
            items += [compilation.model, compilation.whole, compilation.source, compilation.spec, compilation.known]
            items.append(compilation.table.first_call)
            items += [*compilation.table.programs.values(), *compilation.signatures.values()]
            places = [*compilation.places().resolved, *vars(compilation.main).get("resolved", ())]
            items += (site for r in places for site, _ in r.sites)
        return items

    def every_view(self) -> list[AdaptedView]:
        """Return the views that calls may run."""
        return [self.shown]

    def compilations(self) -> list[Compilation]:
        """Return the Compilations that calls may run: the model's own and those of views."""
        every = (self.compilation, *(view.compilation for view in self.every_view()))
        return list({id(compilation): compilation for compilation in every}.values())

    def copied(self) -> None:
        """Reset the state that belongs to the original module; called on the Runner of a copy."""
        self.derived = {}  # this describes the original
        self.live = LiveRoot.of(self.compilation, self.store)

    def complete(self) -> Any:
        """Return a Runner that leaves out no adaptation: here, this one."""
        return self

    def within(self, run: Callable[[], Any]) -> Any:
        """Call a function. If the module is sharded, do so within a call to it, so that its hooks gather the tensors.

        Other hooks do not run, because no caller has called the module.
        """
        inside = not is_unit(self.module) or self.module._graftc.entered
        return run() if inside else self.module(UnitCall(run))

    def key(self, signature: Signature, mode: Modes, entry: Entry = "forward") -> ProgramKey:
        """Return the key of the Program that a call runs."""
        return ProgramKey(entry, mode, signature)

    def as_run(self, key: ProgramKey) -> Program:
        """Return the Program for a key that has no code yet, in the form from which code is generated."""
        return self.program_of(key)

    def program_of(self, key: ProgramKey) -> Program:
        """Return the Program for a key that has no code yet, with every layer written out."""
        if key.entry in FROM_FORWARD:
            return entered(key.entry, self.program_of(key._replace(entry="forward")))
        self.shown.compilation.signatures[key.signature].add_constants(self.store)
        return derived_program(self.shown.compilation, key)
