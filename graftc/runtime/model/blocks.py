"""Modules that run graphs over the Store's tree: a Block for every repeated layer, and a Root above them.

A Root has children, tensors and what every `nn.Module` has, and next to nothing else of its own: what it does is in its
Runner, which is not a module, so that no name of a source model's child can come between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.capture.past import CACHE
from graftc.passes.core.ir.codegen import Function, function_of
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, ProgramKey
from graftc.passes.core.weights.containers import OWN, Container, Node, Tree, UnitCall, of_fsdp
from graftc.passes.core.weights.sharding import computes_on, is_unit, sharded_modules
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.outline import outline
from graftc.passes.graph.packed import reading_parts
from graftc.passes.lowering.outcome import LoweringOutcome
from graftc.runtime.activations.budget import Choices
from graftc.runtime.hooks.embeddings import call_hooks
from graftc.runtime.hooks.layer_calls import (
    Hearing,
    LayerCall,
    enter,
    given,
    hooks_everywhere,
    inputs_of,
    is_heard,
    is_running,
    pending_for,
    running,
)
from graftc.runtime.hooks.layer_learning import Border


@dataclass(frozen=True)
class Recompute:
    """How a Block recomputes its activations in the backward pass.

    Attributes:
        options: keywords of `torch.utils.checkpoint.checkpoint`, beside ``use_reentrant``, which is False.
        offload: hold what is kept for recomputing in the host's memory.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    offload: bool = False

    def __call__(self, function: Function, *inputs: Any) -> Any:
        """Run a function, keeping its inputs only."""
        with self._kept_elsewhere(inputs):
            return checkpoint(function, *inputs, use_reentrant=False, **self.options)

    def _kept_elsewhere(self, inputs: tuple[Any, ...]) -> Any:
        devices = {tensor.device.type for tensor in inputs if isinstance(tensor, Tensor)} - {"cpu"}
        if not self.offload or not devices:
            return nullcontext()
        return save_on_cpu(pin_memory=True, device_type=devices.pop())


class LayerCode(Node):
    """What a Block runs.

    Attributes:
        functions: the code of its part of each Program, by key.
        choices: how much of its activations each kind of call computes again.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        recompute: how.
        borders: what its part of each Program reads and gives, by key.
        calls: how the source's layer is called there, by key, once hooks have asked.
        hearing: whether any layer of the model has hooks.
    """

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self.borders: dict[str, Border] = {}
        self.calls: dict[str, LayerCall] = {}
        self.hearing = Hearing()
        self.choices: Choices = {}
        self.checkpointing = False
        self.recompute = Recompute()

    def enter(self, module: nn.Module, *inputs: Any) -> Any:
        """See `Node`. A layer with hooks is called as the source's is."""
        if self.hearing.hooked or self.hearing.everywhere:
            key, *given = inputs
            if is_heard(module) and is_running():
                return enter(self, module, key, given)
        return module(*inputs)


class Block(Container):
    """One repeated layer: owns its tensors and runs its part of every Program."""

    _graftc: LayerCode

    def __init__(self) -> None:
        super().__init__()
        self._graftc = LayerCode()

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """See `torch.nn.Module.register_forward_hook`. The hook gets and may change what it does in the source model,
        in calls with a cache too. What the graph does not have in that form raises GC043 when it is looked into."""
        self._hear(hook)
        return nn.Module.register_forward_hook(self, hook, **options)

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """See `register_forward_hook`."""
        self._hear(hook)
        return nn.Module.register_forward_pre_hook(self, hook, **options)

    def register_full_backward_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See `register_forward_hook`: gradients are those of the source's arguments and results."""
        self._hear(hook)
        return nn.Module.register_full_backward_hook(self, hook, prepend)

    def register_full_backward_pre_hook(self, hook: Any, prepend: bool = False) -> RemovableHandle:
        """See `register_full_backward_hook`."""
        self._hear(hook)
        return nn.Module.register_full_backward_pre_hook(self, hook, prepend)

    def _hear(self, hook: Any) -> None:
        if not of_fsdp(hook):
            self._graftc.hearing.hooked = True

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run a part of a Program: its key, and what it reads; or what `LayerCode.enter` has prepared.

        Raises:
            GraftError: GC043 for a call as of the source's layer that no graph makes.
        """
        code = self._graftc
        key, *values = inputs or (None,)
        if isinstance(key, str) and not options:
            return self._run(key, values)
        if (pending := pending_for(code)) is None:
            return super().forward()
        return given(pending, self._run(pending.key, inputs_of(pending, inputs, options)))

    def _run(self, key: str, inputs: Sequence[Any]) -> Any:
        code = self._graftc
        function = code.functions[key]
        if code.checkpointing and self.training and torch.is_grad_enabled():
            return code.recompute(getattr(function, "function", function), self, *inputs)
        return function(self, *inputs)


class Root(Tree):
    """The root of a Store's tree. A name that is neither a child's nor an attribute is looked up in its Runner.

    Args:
        runner: what it runs.
    """

    _graftc: Runner

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self._graftc = runner
        self.register_state_dict_post_hook(_tied_once)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_tied_again)  # type: ignore[no-untyped-call]
        runner.adopt(self)

    def __getattr__(self, name: str) -> Any:
        """A child or tensor of this name, or the Runner's own attribute."""
        held = vars(self)
        for table in ("_parameters", "_buffers", "_modules"):
            if name in held.get(table, ()):
                return held[table][name]
        if OWN in held and not name.startswith("__"):
            try:
                return getattr(held[OWN], name)
            except AttributeError as error:
                if error.name != name:  # something that the attribute is made of
                    raise
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._graftc)})  # type: ignore[no-untyped-call]


class Runner:
    """Runs Programs over a Store's tree, with a Block per repeated layer.

    Args:
        store: its tree becomes that of the module.

    Attributes:
        module: the root of the tree.
    """

    module: Root
    learn_layers: Callable[[ProgramKey], None]
    _kind = ""
    """Of the device that all code is for."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._roots: dict[ProgramKey, Function] = {}
        self._programs: dict[ProgramKey, Program] = {}
        self._lowered: dict[ProgramKey, Program] = {}
        self._outcomes: dict[ProgramKey, list[LoweringOutcome]] = {}
        self._label = ""
        self._showing: frozenset[str] = frozenset()
        self._hooked: str | None = None
        self.hearing = Hearing()
        self.choices: Choices = {}

    def adopt(self, module: Root) -> None:
        """Make a module the root of the tree."""
        self.module = module
        self._store.rehome(module)

    @property
    def training(self) -> bool:
        """The mode of the module."""
        return self.module.training

    @property
    def blocks(self) -> dict[str, Block]:
        """Blocks by module path."""
        return {name: module for name, module in self.module.named_modules() if isinstance(module, Block)}

    def compile_layers(self, **options: Any) -> None:
        """Have `torch.compile` compile every repeated layer by itself, in place, when it is called next.

        Layers that do the same share their code, so that compiling takes as long for a deep model as for a shallow one;
        what is around them, such as embeddings, the head and the loss, runs as before. A model without repeated layers
        is compiled as a whole. See `torch.nn.Module.compile`, which compiles the model as one graph.

        Args:
            options: those of `torch.compile`: ``backend``, ``mode``, ``dynamic`` ...
        """
        for module in self.blocks.values() or [self.module]:
            module.compile(**options)

    def install(self, key: ProgramKey, program: Program) -> None:
        """Lower a Program to code; `run` runs it under ``key``."""
        self._programs[key] = program
        self._lower(key)

    def forget(self, entry: Entry) -> None:
        """Let the Programs of one way into the model go, with their code."""
        for key in [key for key in self._programs if key.entry == entry]:
            for table in (self._programs, self._lowered, self._roots, self._outcomes):
                table.pop(key, None)
            for block in self.blocks.values():
                functions = block._graftc.functions
                for name in [name for name in functions if name.startswith(f"{self._label}{key}#")]:
                    del functions[name]

    def write_out(self, key: ProgramKey) -> None:
        """Have code of a graph with every layer written out, as hooks need it."""

    def _lower(self, key: ProgramKey) -> None:
        program = self._lowered[key] = reading_parts(self.lowered(key), self._store)
        outlined = outline(program)
        device = self._code_device()
        for block in outlined.blocks:
            owner = self._store.container(block.path)
            if not isinstance(owner, Block):
                owner = self._store.replace_container(block.path, Block)
            name = f"{self._label}{key}#{block.use}"
            owner._graftc.hearing = self.hearing
            owner._graftc.borders[name] = Border.of(block)
            owner._graftc.calls.pop(name, None)
            owner._graftc.functions[name] = self.code(key, block.graph, owner, device)
        self.run_above(key, outlined.root)
        self._kind = device.type

    def run_above(self, key: ProgramKey, graph: fx.Graph) -> None:
        """Make the code that calls the layers.

        Args:
            key: of the Program.
            graph: of `outline`, which is used up.
        """
        for node in graph.find_nodes(op="call_module"):
            use, *inputs = node.args
            node.args = (f"{self._label}{key}#{use}", *inputs)
        if self._hooked is not None:
            call_hooks(self._lowered[key], graph, self._hooked)
        self._roots[key] = self.code(key, graph, self.module, self._code_device())

    def code(self, key: ProgramKey, graph: fx.Graph, module: nn.Module, device: torch.device) -> Function:
        """Code for a part of a Program."""
        return function_of(graph, module, device)

    def lowered(self, key: ProgramKey) -> Program:
        """What code is made of for a Program: here the Program itself."""
        return self._programs[key]

    def _store_device(self) -> torch.device:
        return self._store.device()

    def _code_device(self) -> torch.device:
        """Where code makes tensors: where the base is, or where FSDP2 puts it for a pass."""
        kind = computes_on(self.module) if is_unit(self.module) else None
        device = self._store_device()
        return device if kind in (None, device.type) else torch.device(str(kind))

    def run(self, key: ProgramKey, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Flat outputs of the Program installed as ``key``."""
        if is_unit(self.module) and self._code_device().type != self._kind:
            self.relower()  # sharding has moved the tensors
        if not is_traced() and hooks_everywhere():
            self.hearing.everywhere = True
        heard = self.hearing.hooked or self.hearing.everywhere
        if heard:
            self.write_out(key)
        program_inputs = self.inputs(key, inputs)
        found: Callable[[], tuple[Any, ...]] = partial(self._roots[key], self.module, *program_inputs)
        for unit in self._passive_units():
            found = partial(unit, UnitCall(found))
        if not heard:
            return found()
        past = inputs.get(CACHE)
        with running(partial(self.learn_layers, key), past.cache if past is not None else None):
            return found()

    def inputs(self, key: ProgramKey, inputs: Mapping[str, Any]) -> list[Any]:
        """What the Program installed as ``key`` is given, in its order."""
        given = {**inputs, **inputs[CACHE].tensors} if CACHE in inputs else inputs
        return [given[name] for name in self._lowered[key].signature]

    def _passive_units(self) -> list[nn.Module]:
        """Modules that FSDP2 has made units by themselves and that compute nothing, as Accelerate does with tables of
        embeddings and heads: their tensors are whole during a pass."""
        if not is_unit(self.module):
            return []
        units = sharded_modules(self.module)
        return [unit for unit in units if isinstance(unit, Container) and not isinstance(unit, Block)]

    def relower(self) -> None:
        """Make all code anew, for tensors that have moved to another device."""
        for key in self._programs:
            self._lower(key)


def _tied_once(module: Root, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict has tied tensors once, by the name that owns them, as file formats want it."""
    for alias in module._graftc._store.aliases:
        state.pop(prefix + alias, None)


def _tied_again(module: Root, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Loading finds tied tensors under each of their names."""
    for alias, owner in module._graftc._store.aliases.items():
        if prefix + owner in state:
            state.setdefault(prefix + alias, state[prefix + owner])
