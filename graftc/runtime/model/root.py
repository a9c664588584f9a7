"""The Runner, which runs Programs over the Store's tree, and the Root, which is the module that owns a Runner.

Apart from children, tensors and the attributes of every `nn.Module`, a Root has almost nothing of its own. Its
behaviour is in its Runner, which is not a module, so that names cannot clash with those of a source model's children.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from graftc.compat.modules import BUFFERS, CHILDREN, PARAMETERS
from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.capture.past import CACHE
from graftc.compiler.compilation import Compilation
from graftc.compiler.steering import Steerings
from graftc.passes.core.ir.codegen import Executable, Function, executable_of
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, ProgramKey
from graftc.passes.core.weights.containers import OWN, Container, Tree, UnitCall
from graftc.passes.core.weights.sharding import computes_on, is_unit, sharded_modules
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.outline import outline
from graftc.passes.graph.packed_weights import reading_parts
from graftc.passes.lowering.cache_writes import write_caches
from graftc.records.graphs import LoweringOutcome
from graftc.runtime.activations.budget import Choices
from graftc.runtime.hooks.boundaries import heard_module, learn_modules, stopping, without_stops
from graftc.runtime.hooks.embeddings import call_hooks
from graftc.runtime.hooks.layer_calls import Hearing, LayerCall, Running, hooks_everywhere, running, unknown_call
from graftc.runtime.hooks.layer_learning import Border, learn_layers
from graftc.runtime.live.served import ServedCalls
from graftc.runtime.model.blocks import Block

Value = TypeVar("Value")
_CALLS = "calls of modules"


@dataclass
class Installed:
    """A Program and its code.

    Attributes:
        program: the Program that is run.
        lowered: the Program from which the code was generated.
        run: the code above the layers, ``run(module, *inputs)``.
        outcomes: what lowering has rewritten and what it has not.
        known: values computed from the Program, by name.
    """

    program: Program
    lowered: Program | None = None
    run: Function | None = None
    outcomes: list[LoweringOutcome] = field(default_factory=list)
    known: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[Program], Value]) -> Value:
        """Return a value derived from the Program, computed when it is first requested."""
        if name not in self.known:
            self.known[name] = make(self.program)
        return cast(Value, self.known[name])


@dataclass
class AdaptedView:
    """A Compilation and its code, run by a Runner. Several views may share a tree of tensors.

    Attributes:
        compilation: the Compilation whose Programs are run.
        executables: the code of its Programs, by key.
        label: the prefix for the names of its code in Blocks.
        off: the adaptations that it leaves out.
        steering: the controllers and objectives that steer its training; None until requested.
        device_type: the device type that its code is for.
        served: of a model that is taken apart, the calls that its graphs serve.
    """

    compilation: Compilation
    executables: dict[ProgramKey, Installed] = field(default_factory=dict)
    label: str = ""
    off: frozenset[str] = frozenset()
    steering: Steerings | None = None
    device_type: str = ""
    served: ServedCalls = field(default_factory=ServedCalls)

    def has(self, key: ProgramKey) -> bool:
        """Return whether there is code for a key."""
        return key in self.executables and self.executables[key].run is not None

    def lowered_of(self, key: ProgramKey) -> Program:
        """Return the Program from which the code for a key was generated."""
        lowered = self.executables[key].lowered
        assert lowered is not None
        return lowered


class Runner:
    """Runs Programs over a Store's tree, with one Block for each repeated layer.

    Args:
        compilation: the Compilation whose Programs are run.
        store: the Store whose tree becomes the module's.

    Attributes:
        module: the root of the tree.
        store: the tensors.
        shown: the view that calls run.
        hearing: the hooks that observe calls to layers.
        choices: for each kind of call, how much of its activations the code above the layers recomputes.
        hooked: the path of the embedding table, once it has hooks.
        told: the paths of other modules that may have hooks, inside layers or outside them.
        stops: the paths of the modules at which the current code stops to call hooks.
        entered: whether a call to the module is running, so that the module's hooks have gathered its tensors.
    """

    module: Root

    def __init__(self, compilation: Compilation, store: Store) -> None:
        self.store = store
        self.shown = AdaptedView(compilation)
        self.hooked: str | None = None
        self.hearing = Hearing()
        self.choices: Choices = {}
        self.told: set[str] = set()
        self.stops: frozenset[str] = frozenset()
        self.entered = False

    def adopt(self, module: Root) -> None:
        """Make a module the root of the tree."""
        self.module = module
        self.store.rehome(module)

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.store.device()

    @property
    def training(self) -> bool:
        """Whether the module is in train mode."""
        return self.module.training

    @property
    def blocks(self) -> dict[str, Block]:
        """The Blocks, by module path."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, Block)}

    def applies(self, adaptation: str) -> bool:
        """Return whether calls run an adaptation, given its name in the spec."""
        return adaptation not in self.shown.off

    def compile_layers(self, **options: Any) -> None:
        """Compile every repeated layer separately and in place with `torch.compile`, at its next call.

        Identical layers share their code, so compiling a deep model takes no longer than compiling a shallow one.
        Everything around them, such as the embeddings, the head and the loss, runs as before. A model without repeated
        layers is compiled as a whole. To compile the model as one graph, see `torch.nn.Module.compile`.

        Args:
            options: the options of `torch.compile`: ``backend``, ``mode``, ``dynamic`` ...
        """
        for module in self.blocks.values() or [self.module]:
            module.compile(**options)

    def install(self, key: ProgramKey, program: Program) -> None:
        """Lower a Program to code, which `run` finds under ``key``."""
        executable = self.shown.executables[key] = Installed(program)
        self._lower(key, executable)

    def forget(self, entry: Entry) -> None:
        """Discard one entry's Programs and their code."""
        executables = self.shown.executables
        for key in [key for key in executables if key.entry == entry]:
            del executables[key]
            for block in self.blocks.values():
                functions = block._graftc.functions
                for name in [name for name in functions if name.startswith(f"{self.shown.label}{key}#")]:
                    del functions[name]

    def write_out(self, key: ProgramKey) -> None:
        """Generate code with every layer written out, as hooks require, unless the current code already does so."""

    def _lower(self, key: ProgramKey, executable: Installed) -> None:
        executable.known.pop(_CALLS, None)
        source = stopping(executable.program, self.stops) if self.stops else self.lowered(key, executable)
        program = reading_parts(source, self.store)
        program = executable.lowered = write_caches(program, in_place=key.mode == "eval")
        outlined = outline(program)
        device = self._code_device()
        executables: dict[fx.Graph, Executable] = {}
        for block in outlined.blocks:
            if block.graph not in executables:  # identical layers share a graph
                executables[block.graph] = executable_of(block.graph, device)
            owner = self.store.container(block.path)
            if not isinstance(owner, Block):
                owner = self.store.replace_container(block.path, Block)
            name = f"{self.shown.label}{key}#{block.use}"
            owner._graftc.hearing = self.hearing
            border = Border.of(block)
            owner._graftc.borders[name] = without_stops(border, program) if self.stops else border
            owner._graftc.calls.pop(name, None)
            owner._graftc.functions[name] = self.code(key, block.graph, owner, executables[block.graph])
        self.run_above(key, outlined.root)
        self.shown.device_type = device.type

    def run_above(self, key: ProgramKey, graph: fx.Graph) -> None:
        """Generate the code that calls the layers.

        Args:
            key: the key of the Program.
            graph: the root graph that `outline` returns; it is modified.
        """
        executable = self.shown.executables[key]
        for node in graph.find_nodes(op="call_module"):
            use, *inputs = node.args
            node.args = (f"{self.shown.label}{key}#{use}", *inputs)
        if self.hooked is not None:
            call_hooks(self.shown.lowered_of(key), graph, self.hooked)
        executable.run = self.code(key, graph, self.module, executable_of(graph, self._code_device()))

    def code(self, key: ProgramKey, graph: fx.Graph, module: nn.Module, executable: Executable) -> Function:
        """Return the code for the part of a Program whose tensors are in ``module``."""
        return executable.over(module)

    def lowered(self, key: ProgramKey, executable: Installed) -> Program:
        """Return the Program from which code is generated: here, the Program itself."""
        return executable.program

    def _code_device(self) -> torch.device:
        """Return the device on which code creates tensors: the base's, or that to which FSDP2 moves it for a pass."""
        kind = computes_on(self.module) if is_unit(self.module) else None
        device = self.device
        return device if kind in (None, device.type) else torch.device(str(kind))

    def run(self, key: ProgramKey, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Run the Program installed as ``key`` and return its flat outputs."""
        if is_unit(self.module) and self._code_device().type != self.shown.device_type:
            self.relower()  # sharding has moved the tensors
        if not is_traced() and hooks_everywhere():
            self.hearing.everywhere = True
        if (self.told or self.stops) and not is_traced():
            self._stop_where_heard()
        heard = self.hearing.hooked or self.hearing.everywhere or self.stops
        if heard:
            self.write_out(key)
        program_inputs = self.inputs(key, inputs)
        code = self.shown.executables[key].run
        assert code is not None
        forward: Callable[[], tuple[Any, ...]] = partial(code, self.module, *program_inputs)
        for unit in self._passive_units():
            forward = partial(unit, UnitCall(forward))
        if not heard:
            return forward()
        past = inputs.get(CACHE)
        learn = partial(learn_layers, self.shown, self.store, self.module, key)
        calls = partial(self._module_calls, key)
        with running(Running(learn, calls, self.module, past.cache if past is not None else None)):
            return forward()

    def _module_calls(self, key: ProgramKey) -> dict[str, LayerCall]:
        """Return how modules with hooks are called in a graph.

        In a sharded model, their calls are unknown, because no process has all tensors in full.
        """
        known = self.shown.executables[key].known
        if _CALLS not in known:
            known[_CALLS] = (
                {path: unknown_call(path) for path in self.stops}
                if is_unit(self.module)
                else learn_modules(self.shown, key, sorted(self.stops))
            )
        return cast("dict[str, LayerCall]", known[_CALLS])

    def tell(self, path: str) -> None:
        """Make the next call stop where a module begins and ends, to call the hooks registered on that module."""
        self.told.add(path)

    def _stop_where_heard(self) -> None:
        """Generate the code again if the set of modules with hooks has changed."""
        self.told = {path for path in self.told if heard_module(self.module, path)}
        if self.told != self.stops:
            self.stops = frozenset(self.told)
            for key in list(self.shown.executables):
                self.write_out(key)
            self.relower()

    def listen(self) -> None:
        """Allow hooks to be registered on modules of the tree."""
        for path, each in self.module.named_modules():
            if isinstance(each, Container) and not isinstance(each, Block):
                each._graftc.tell = partial(self.tell, path)

    def inputs(self, key: ProgramKey, inputs: Mapping[str, Any]) -> list[Any]:
        """Return the inputs of the Program installed as ``key``, in its order."""
        given = {**inputs, **inputs[CACHE].tensors} if CACHE in inputs else inputs
        return [given[name] for name in self.shown.lowered_of(key).signature]

    def _passive_units(self) -> list[nn.Module]:
        """Return the modules that are FSDP2 units of their own but compute nothing.

        Accelerate turns embedding tables and heads into such units; their tensors are complete during a pass.
        """
        if not is_unit(self.module):
            return []
        return [
            unit for unit in sharded_modules(self.module) if isinstance(unit, Container) and not isinstance(unit, Block)
        ]

    def relower(self) -> None:
        """Generate all code again, for tensors that have moved to another device."""
        for key, executable in self.shown.executables.items():
            self._lower(key, executable)


class Root(Tree):
    """The root of a Store's tree. Names that are neither children nor attributes are looked up in its Runner.

    Args:
        runner: the Runner that the module will own.
    """

    _graftc: Runner

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self._graftc = runner
        self.register_state_dict_post_hook(_tied_once)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_tied_again)  # type: ignore[no-untyped-call]
        runner.adopt(self)

    def __getattr__(self, name: str) -> Any:
        """Return the child or tensor with this name, or else the Runner's attribute."""
        attributes = vars(self)
        for table in (PARAMETERS, BUFFERS, CHILDREN):
            if name in attributes.get(table, ()):
                return attributes[table][name]
        if OWN in attributes and not name.startswith("__"):
            try:
                return getattr(attributes[OWN], name)
            except AttributeError as error:
                if error.name != name:  # raised while computing the attribute
                    raise
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._graftc)})  # type: ignore[no-untyped-call]


def _tied_once(module: Root, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Keep each tied tensor only once in a state dict, under its owner's name, as file formats require."""
    for alias in module._graftc.store.aliases:
        state.pop(prefix + alias, None)


def _tied_again(module: Root, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add each tied tensor to a state dict under all of its names, for loading."""
    for alias, owner in module._graftc.store.aliases.items():
        if prefix + owner in state:
            state.setdefault(prefix + alias, state[prefix + owner])
