"""A Runner with the interface of a source model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn

from graftc.compiler.cached import cannot_be_cached, gates_over_rows
from graftc.compiler.capture.interface import Interface, config_of, dtype_of
from graftc.compiler.capture.isolation import exclusive, is_traced, seldom_collected
from graftc.compiler.capture.past import CACHE, USE_CACHE, with_cache
from graftc.compiler.compilation import Compilation
from graftc.compiler.derived import FROM_FORWARD, entered
from graftc.compiler.derived import program_of as derived_program
from graftc.compiler.folding.samples import remember
from graftc.compiler.input_checks import require
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
from graftc.runtime.live.element_code import ElementCode, parts_of
from graftc.runtime.live.element_run import ELEMENTS
from graftc.runtime.live.live_root import LiveRoot
from graftc.runtime.model.base_model import install_base_model
from graftc.runtime.model.choices import with_choices
from graftc.runtime.model.deferred import CallState, cache_field, deferred_cache, may_return_cache, not_at_once
from graftc.runtime.model.libraries import refuse_deepspeed
from graftc.runtime.model.packing import warn_of_packed
from graftc.runtime.model.past import read_past, tokens_of
from graftc.runtime.model.root import AdaptedView, Root, Runner
from graftc.specs.errors.diagnostics import GraftError

OF_GENERATING = ("generation_config", "input_modalities", "output_modalities")
"""Attributes of a source model that a compiled one has as well, as copies."""


class ModelRunner(Runner):
    """A Runner with the interface of a source model: inputs by name or position, the model's own output class.

    Args:
        compilation: Programs, and the source model's interface.
        store: the tensors to run on.

    Attributes:
        compilation: that one.
        interface: of the source model.
        derived: what has been worked out of the Compilation as it is, by its name.
    """

    config: Any

    def __init__(self, compilation: Compilation, store: Store) -> None:
        super().__init__(compilation, store)
        model = compilation.model
        self.compilation = compilation
        self.live = LiveRoot.of(compilation)
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
        own = (name for name in OF_GENERATING if hasattr(model, name) and name not in model._modules)
        vars(self).update(copy.deepcopy({name: getattr(model, name) for name in own}))

    def adopt(self, module: Root) -> None:
        """See `Runner.adopt`."""
        super().adopt(module)
        self._base_model = install_base_model(self.store, self.compilation.model, self.hidden)
        self._embeddings = install_embeddings(self.store, self.compilation.model, self._call_hooks)
        self.listen()
        self._start_in_modes(module)

    def _call_hooks(self) -> None:
        """Make code that calls the hooks of the table of embeddings."""
        if self.hooked is None:
            self.hooked = self._embeddings
            try:
                self.relower()
            except GraftError:
                self.hooked = None
                self.relower()
                raise

    def _start_in_modes(self, module: Root) -> None:
        """Put every module into the mode of the source's."""
        module.train(self.compilation.model.training)
        for path, source in self.compilation.model.named_modules(remove_duplicate=False):
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
    def dtype(self) -> torch.dtype:
        """Element type that the graphs were captured in."""
        return self._dtype

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outputs of a call, as the source model gives them.

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
        """The last hidden state of a call, ``[batch, sequence, hidden]``, without the head: ``last_hidden_state``
        of the source model's base model.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, and where the model returns no hidden states.
        """
        return self.within(lambda: self.respond(args, kwargs, "hidden", **{FLAG: True}))

    def respond(self, args: tuple[Any, ...], kwargs: dict[str, Any], entry: Entry = "forward", **flags: Any) -> Any:
        """The outputs of one way into the model."""
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
        """The outputs for what is present in a call, and what chooses among adaptations as it was given."""
        if USE_CACHE in present:
            read_past(self.shown.compilation, present, self.begins)
        if self.shown.compilation.controls:
            present = with_choices(self.shown.compilation, present, chosen)
        return self.run_part(present, plain, entry)

    @property
    def begins(self) -> int:
        """The position of a text's first token: adaptations may stand in front of it."""
        return 0

    def _can_return_cache(self) -> bool:
        """Whether the model keeps a cache of keys and values, and no adaptation rules one out."""
        return self.keeps_cache() and not cannot_be_cached(self.shown.compilation)

    def keeps_cache(self) -> bool:
        """Whether the source model keeps a cache of keys and values; it is asked once."""
        if (known := self.shown.compilation.known_to_keep_cache) is None:
            with exclusive():
                known = self.shown.compilation.keeps_cache
        return known

    def _with_cache_to_come(self, present: dict[str, Any], chosen: Mapping[str, Any], plain: bool) -> Any:
        """The outputs of a call, whose cache is made when it is used."""
        call = CallState.of({**present, **chosen}, self._written, self.shown.device_type)
        outputs = self._chosen(dict(present), chosen, False)
        field = cache_field(outputs)
        if field is not None and self.keeps_cache():
            again = copy.copy(self)  # as it is now, whatever calls leave out by then
            inputs = {name: call.inputs[name] for name in present}
            choice = {name: call.inputs[name] for name in chosen}

            def make() -> Any:
                if is_unit(self.module):
                    raise not_at_once("of a sharded model all processes make a cache together")
                if again.training:
                    raise not_at_once(
                        "the cache of a call is made when it is first used, and the model is in train mode by now"
                    )
                with call.again():
                    return again._chosen({**inputs, USE_CACHE: True}, choice, False)[field]

            made = deferred_cache(self.shown.compilation.cache_layout.pairs, make)
            outputs = type(outputs)(**{**outputs, field: made})
        return outputs.to_tuple() if plain and hasattr(outputs, "to_tuple") else outputs

    def _written(self) -> tuple[Any, ...]:
        """A value that differs once the adaptations, their tensors, or the hooks on the table of embeddings have
        changed."""
        key = id(self.compilation), self.shown.device_type
        known = self.derived.get("adapters")
        if known is None or known[0] != key:
            known = self.derived["adapters"] = key, [tensor for _, tensor in self.store.adapters()]
        table = self.module.get_submodule(self.hooked) if self.hooked is not None else None
        hooks = () if table is None else (*table._forward_pre_hooks, *table._forward_hooks)
        return (*key, hooks, sum(tensor._version for tensor in known[1] if not tensor.is_inference()))

    def run_part(self, present: dict[str, Any], plain: bool, entry: Entry = "forward") -> Any:
        """The outputs for tensors and flags by name."""
        past = present.get(CACHE)
        key = self.ready(present, entry)
        if not is_traced():
            self._look_at(key, present)
        results = self.results(key, present)
        outputs = self.shown.lowered_of(key).outputs.build(results)
        if past is not None:
            outputs = with_cache(outputs, past.cache)
        return outputs.to_tuple() if plain and hasattr(outputs, "to_tuple") else outputs

    def _look_at(self, key: ProgramKey, present: Mapping[str, Any]) -> None:
        """Look at a call as far as its sizes and values say what is wrong with it, the first of its kind at all."""
        self._require_positions(key, present)
        if self.device.type != "meta":
            require(self.shown.executables[key].program.checks, present, self.store)
        if key.signature in self._looked_at:
            return
        refuse_deepspeed()
        self._looked_at.add(key.signature)
        remember(self.shown.compilation, key.signature, present)
        resolved = self.shown.compilation.places().resolved if key.stage == "adapted" else ()
        virtual = [item.name for item in resolved if item.spec.virtual_tokens()]
        warn_of_packed(present, virtual, partial(gates_over_rows, self.shown.executables[key].program))

    def _require_positions(self, key: ProgramKey, present: Mapping[str, Any]) -> None:
        """Whether every token of a call has a position.

        Raises:
            GraftError: GC143.
        """
        for table in self.position_tables(key):
            table.require(present, self.store)

    def position_tables(self, key: ProgramKey) -> tuple[PositionTable, ...]:
        """Where a Program reads at the positions of tokens; on the meta device there are no values that would tell."""
        if self.device.type == "meta":
            return ()
        if key not in self.shown.executables:
            place = self.shown.label, key
            if place not in self.derived:
                self.derived[place] = position_tables(self.shown.compilation.table.programs[key], self.store)
            return cast("tuple[PositionTable, ...]", self.derived[place])
        return self.shown.executables[key].once("positions", lambda program: position_tables(program, self.store))

    def results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """Flat outputs of a call."""
        return self.run(key, present)

    def ready(self, present: Mapping[str, Any], entry: Entry = "forward") -> ProgramKey:
        """The key under which `run` has code for a call's tensors and flags; it is captured where it is missing.

        Raises:
            GraftError: GC031 where it cannot be.
        """
        signature = self.shown.compilation.find(present)
        key = self.key(signature, self.mode_of(signature), entry) if signature is not None else None
        if key is None or not self.shown.has(key):
            if is_traced() and torch.compiler.is_exporting():
                message = f"{', '.join(present)} have no graph yet; call the model once before exporting it"
                raise GraftError("GC031", message)
            return cast("ProgramKey", self._captured(present, entry))
        return key

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="a compiled model captures a call that is new: call it once before compiling it"
    )
    def _captured(self, present: Mapping[str, Any], entry: Entry) -> ProgramKey:
        """The key of a call that has no code yet, which `torch.compile` leaves to Python the first time."""
        with exclusive(), seldom_collected():
            signature = signature_for(self.shown.compilation, present)
            key = self.key(signature, self.mode_of(signature), entry)
            if not self.shown.has(key):
                self.install(key, self.as_run(key))
        return key

    def run_above(self, key: ProgramKey, graph: fx.Graph) -> None:
        """See `Runner.run_above`. Of a live model each element has code of its own."""
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
        """The mode that the modules are in, where a dropout that was set to zero is in eval mode; code of
        `torch.compile` looks at that of the whole model, and at such dropouts once."""
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
        """Paths of dropouts that were set to zero."""
        paths = self.shown.compilation.signatures[signature].moded
        return frozenset(silent(path) for path in paths if drops_nothing(self.store.nearest(path)))

    def install(self, key: ProgramKey, program: Program) -> None:
        """See `Runner.install`. Dropouts of adaptations have modules that stand for them, for ``eval()`` and for
        whoever sets ``p`` to zero."""
        super().install(key, program)
        for path, p in everywhere(program.graph, dropouts(program)).items():
            parent, _, name = path.rpartition(".")
            holder = self.store.container(parent)
            if holder._modules.get(name) is None:
                training = self.store.owner(module_of(path)).training
                holder._modules[name] = Container.like(nn.Dropout(p)).train(training)

    def shared(self) -> list[Any]:
        """What a copy of the module has in common with it: Graphs, which hold no tensors, and the source model."""
        executables = [executable for view in self.every_view() for executable in view.executables.values()]
        graphs = [graph for each in executables for graph in (each.program, each.lowered)]
        found: list[Any] = [self.interface, *graphs, self.derived, self.live]
        for compilation in self.compilations():
            if compilation.store is not self.store:
                found.append(compilation)
                continue
            found += [compilation.model, compilation.source, compilation.spec, compilation.known]
            found.append(compilation.table.first_call)
            found += [*compilation.table.programs.values(), *compilation.signatures.values()]
            places = [*compilation.places().resolved, *vars(compilation.main).get("resolved", ())]
            found += (site for r in places for site, _ in r.sites)
        return found

    def every_view(self) -> list[AdaptedView]:
        """Those that calls may run."""
        return [self.shown]

    def compilations(self) -> list[Compilation]:
        """Those that calls may run: the model's own, and those of views."""
        every = (self.compilation, *(view.compilation for view in self.every_view()))
        return list({id(compilation): compilation for compilation in every}.values())

    def copied(self) -> None:
        """Called when the module has been copied, on the copy's Runner."""
        self.derived = {}  # it is about the original
        self.live = LiveRoot.of(self.compilation)

    def complete(self) -> Any:
        """A Runner that leaves no adaptation out: this one, where it leaves out none."""
        return self

    def within(self, run: Callable[[], Any]) -> Any:
        """Run something inside of a call of the module where that is sharded: its hooks gather the tensors. Other hooks
        are not told of calls that nobody made."""
        inside = not is_unit(self.module) or self.module._graftc.entered
        return run() if inside else self.module(UnitCall(run))

    def key(self, signature: Signature, mode: Modes, entry: Entry = "forward") -> ProgramKey:
        """The key of what a call runs."""
        return ProgramKey(entry, mode, signature)

    def as_run(self, key: ProgramKey) -> Program:
        """The Program of a key that has no code yet, as code is made of it."""
        return self.program_of(key)

    def program_of(self, key: ProgramKey) -> Program:
        """The Program of a key that has no code yet, with every layer written out."""
        if key.entry in FROM_FORWARD:
            return entered(key.entry, self.program_of(key._replace(entry="forward")))
        self.shown.compilation.signatures[key.signature].add_constants(self.store)
        return derived_program(self.shown.compilation, key)
