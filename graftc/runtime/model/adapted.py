"""The Runner of a model with adaptations, which can leave some out and compile other models from the same base.

The model without some adaptations is an `AdaptedView`: a Compilation of another spec over the model's own Store,
together with its code. Showing a view is an assignment; calls then run it at no extra cost.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from graftc.compat.fsdp import computing_dtype
from graftc.compat.modules import parameters_of
from graftc.compiler.capture.isolation import exclusive, is_traced
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import Snapshot, adapter_values, snapshot
from graftc.compiler.pipeline import recompile
from graftc.compiler.resolve.train import TRAIN
from graftc.compiler.roles.findings import Structure
from graftc.compiler.steering import Steerings, steerings
from graftc.passes.core.ir.codegen import Executable, Function
from graftc.passes.core.ir.functions import UnlikeBodyError, calls
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, Mode, Modes, ProgramKey, Signature
from graftc.passes.core.ir.updates import as_source
from graftc.passes.core.method.base_gradients import wanted
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.passes.lowering.lower import lower
from graftc.passes.lowering.requested_loss import warn_of_whole
from graftc.passes.lowering.token_losses import token_losses
from graftc.passes.lowering.update_scales import scale_in_sums
from graftc.runtime.activations.training_code import training_code
from graftc.runtime.model.blocks import Recompute
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.root import AdaptedView, Installed
from graftc.runtime.model.views import Leaving, Progress, Tables, over, tables_of
from graftc.specs.changes import leaving
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import as_names
from graftc.specs.errors.diagnostics import GraftError, GraftWarning, unknown_name
from graftc.specs.methods.prefix import PrefixSpec

_LABELS = itertools.count(1)


class AdaptedRunner(ModelRunner):
    """A Runner with adaptations, used by all code that folds, saves, exports, inspects or trains a model.

    Args:
        compilation, store: see `ModelRunner`.

    Attributes:
        leaving: the adaptations that calls leave out.
        views: the views created so far, keyed by the adaptations that they leave out.
        progress: the training progress.
        base_only: whether calls run the base's graphs.
        as_reference: whether calls run the eval graphs in either mode.
        recompute: how layers recompute activations, and ``n`` if every ``n``-th layer does so; None if none does.
    """

    def __init__(self, compilation: Compilation, store: Store) -> None:
        super().__init__(compilation, store)
        self.leaving, self.progress = Leaving(), Progress()
        self.views: dict[frozenset[str], AdaptedView] = {}
        self.base_only = self.as_reference = False
        self.recompute: tuple[Recompute, int] | None = None

    # Other models on the same base

    def compiled_of(self, compilation: Compilation) -> Any:
        """Return a compiled model that runs a Compilation."""
        raise NotImplementedError

    def over(self, compilation: Compilation) -> AdaptedRunner:
        """Return the Runner for another Compilation, which has the same Programs over another Store."""
        return cast(AdaptedRunner, self.compiled_of(compilation)._graftc)

    def sibling(
        self,
        spec: Spec,
        values: Mapping[str, Tensor],
        model: nn.Module | None = None,
        axes: Sequence[Axis] | None = None,
    ) -> Any:
        """Compile another spec for the same base and first signature, on the device of this model.

        Args:
            spec: the spec to compile.
            values: initial adapter tensors, by name.
            model: another base; by default the same one.
            axes: the inputs with changed dtypes, if the other base has another dtype.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraftWarning)  # they were issued when this model was compiled
            compilation = recompile(self.compilation, spec, values, model, axes)
        return self.compiled_of(compilation).to(self.device)

    def alone(self, names: tuple[str, ...]) -> Any:
        """Compile a model that has only these adaptations, ``train:`` and added tokens, and its own adapter tensors.

        Raises:
            GraftError: GC091 for an unknown adaptation, GC036 for a part of a composition.
        """
        spec = self.compilation.spec
        kept = self.adaptations(names)
        gone = {str(a.name) for a in spec.adapt} - kept
        composed = {str(c.name) for c in spec.compose if not set(c.members) & kept}
        values = {n: t for n, t in adapter_values(self.store) if owner_of(n) not in gone | composed}
        return self.sibling(leaving(spec, gone), values)

    # Contents of the Compilation

    @property
    def spec(self) -> Spec:
        """The spec from which the model was compiled."""
        return self.compilation.spec

    @property
    def structure(self) -> Structure:
        """The roles found in the model."""
        return self.compilation.main.structure

    @property
    def snapshot(self) -> Snapshot:
        """Places, tensors and Programs as data, for inspection."""
        return snapshot(self.compilation)

    def program(self, mode: Mode = "eval", *, base: bool = False) -> Program:
        """Return the Program of the first signature: the adapted one, or the base's own."""
        return self.compilation.program(mode, "base" if base else "adapted")

    @property
    def steering(self) -> Steerings:
        """The controllers and objectives that steer training in the shown view."""
        if self.shown.steering is None:
            self.shown.steering = steerings(self.compilation)
        return self.shown.steering

    @property
    def everything(self) -> Steerings:
        """The controllers and objectives that steer training if no adaptation is left out."""
        return self.complete().steering

    # Calls

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the outputs of a call, as `ModelRunner.call` does.

        Raises:
            GraftError: GC044 if a base tensor has been unfrozen, which code compiled by `torch.compile` does not
                detect; GC130 if FSDP2 computes in a dtype other than that of the graphs.
        """
        if is_unit(self.module) and computing_dtype(self.module) not in (None, self.dtype):
            own, other = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, computing_dtype(self.module)))
            message = f"FSDP2 computes in {other}, but the graphs were captured in {own}"
            raise GraftError("GC130", message, hint=f"load the base in {other}, or leave out param_dtype")
        if torch.is_grad_enabled() and not is_traced():
            self._check_frozen()
        return super().call(args, kwargs)

    def _check_frozen(self) -> None:
        for path, table, name in self.once("frozen", self._parameters_of_base):
            tensor = table[name]
            if tensor.requires_grad and not wanted(tensor):
                message = f"{path} requires a gradient, but it belongs to the source model"
                module = path.rpartition(".")[0] or path
                hint = f"add train: [{module}] to the spec, which trains a copy of it, or freeze it again"
                raise GraftError("GC044", message, hint=hint)

    def _parameters_of_base(self) -> list[tuple[str, dict[str, Any], str]]:
        """Return the names of the base's parameters, each with the table that contains it and its key in that table."""
        names = [name for name, tensor in self.store.base() if isinstance(tensor, nn.Parameter)]
        split = ((name, *name.rpartition(".")) for name in names)
        return [(name, parameters_of(self.store.owner(path)), last) for name, path, _, last in split]

    @property
    def begins(self) -> int:
        """The position of a text's first token, which follows shifted prefixes and virtual tokens."""
        if self.base_only:
            return 0
        specs = [resolved.spec for resolved in self.shown.compilation.places().resolved]
        shifted = [s.length for s in specs if isinstance(s, PrefixSpec) and s.positions == "shifted"]
        return sum([*shifted, *(run.length for spec in specs for run in spec.virtual_tokens())])

    @contextmanager
    def running_base(self) -> Iterator[None]:
        """Run the base's graphs in all calls within the block; blocks may be nested."""
        before, self.base_only = self.base_only, True
        try:
            yield
        finally:
            self.base_only = before

    def of_base(self) -> AdaptedRunner:
        """Return a Runner of the same module that always runs the base's eval graphs, whatever this one runs."""
        runner = copy.copy(self)
        runner.base_only = runner.as_reference = True
        return runner

    def key(self, signature: Signature, mode: Modes, entry: Entry = "forward") -> ProgramKey:
        """Return the key of the Program that a call runs: an adapted graph, or the base's."""
        return ProgramKey(entry, mode, signature, "source" if self.base_only else "adapted")

    def mode_of(self, signature: Signature) -> Modes:
        """Return the mode of the modules, or eval for a reference (`as_reference`)."""
        return "eval" if self.as_reference else super().mode_of(signature)

    def program_of(self, key: ProgramKey) -> Program:
        """Return the Program for a key that has no code yet, with every layer written out.

        Entries that score tokens are derived from ``forward``; the base's Program computes what the source model does.
        """
        if key.entry in ("losses", "scores"):
            return token_losses(self.program_of(key._replace(entry="forward")), scores=key.entry == "scores")
        return self._with_updates(key, super().program_of(key))

    def _with_updates(self, key: ProgramKey, program: Program) -> Program:
        return as_source(program, self.store.updated) if key.stage == "source" and key.entry == "forward" else program

    def as_run(self, key: ProgramKey) -> Program:
        """Return the Program for a key; identical layers call functions, unless hooks need every layer written out."""
        compilation = self.shown.compilation
        program = compilation.table.programs.get(key)
        heard = self.hearing.hooked or self.hearing.everywhere or self.told or self.stops
        if program is None or not calls(program.graph) or heard:
            return super().as_run(key)
        compilation.signatures[key.signature].add_constants(self.store)
        return self._with_updates(key, program)

    def write_out(self, key: ProgramKey) -> None:
        """Install the Program for a key with every layer written out, if some of its layers call functions."""
        if calls(self.shown.executables[key].program.graph):
            self.install(key, self.program_of(key))

    # Training graphs are lowered before they become code

    def install(self, key: ProgramKey, program: Program) -> None:
        """Lower a Program to code, with all layers written out if a function call does not correspond to one block."""
        try:
            super().install(key, program)
        except UnlikeBodyError:
            super().install(key, self.program_of(key))
        self.tell_blocks()

    def tell_blocks(self) -> None:
        """Set how each layer recomputes activations."""
        recompute, every = self.recompute or (Recompute(), 0)
        for number, block in enumerate(self.blocks.values()):
            code = block._graftc
            code.checkpointing, code.recompute = every > 0 and number % every == 0, recompute

    def lowered(self, key: ProgramKey, executable: Installed) -> Program:
        """Return the Program from which code is generated, rewritten for training or for eval mode."""
        if not _trains(key):
            return scale_in_sums(executable.program) if key.mode == "eval" else executable.program
        spec = self.shown.compilation.spec
        lowered, executable.outcomes = lower(executable.program, spec, self.steering.outputs)
        if executable.lowered is None:  # the first time
            warn_of_whole(spec, executable.program, executable.outcomes)
        return lowered

    def code(self, key: ProgramKey, graph: fx.Graph, module: nn.Module, executable: Executable) -> Function:
        """Return the code for a part of a Program; code for training graphs stores less than autograd would."""
        if self.stops or not _trains(key):  # hooks see each value once, so no value is recomputed
            return super().code(key, graph, module, executable)
        memory, off = self.shown.compilation.spec.memory, self.shown.compilation.spec.optimise.off
        plain = "recompute" in off and memory.budget is None and not memory.offload
        device = self._code_device()
        function = executable.over(module)
        return training_code(function, graph, device, plain=plain, budget=memory.budget, offload=memory.offload)

    # Adaptations that are left out

    @contextmanager
    def without(self, names: tuple[str, ...]) -> Iterator[None]:
        """Leave some adaptations out of the model while the block runs.

        Raises:
            GraftError: GC091 for an unknown adaptation, GC036 for a part of a composition.
        """
        off, left = self.adaptations(names), self.leaving
        self.show(left.hidden | off)
        depth = len(left.within)
        left.within.append(off)
        try:
            yield
        finally:  # adaptations may have been added, removed or renamed meanwhile
            del left.within[depth:]
            self.show(left.hidden)

    def beside(self, names: Iterable[str]) -> AdaptedRunner:
        """Return a Runner of the same module without some adaptations, unaffected by later changes to what is left out.

        Raises:
            GraftError: as for `without`.
        """
        runner = copy.copy(self)
        runner.shown = self._known_view(self.leaving.hidden | self.adaptations(tuple(names)))
        return runner

    def complete(self) -> AdaptedRunner:
        """Return a Runner with every adaptation: this one, unless it leaves something out or runs the base."""
        if not (self.shown.off or self.base_only):
            return self
        runner = copy.copy(self)
        runner.leaving, runner.shown = Leaving(), self.whole
        runner.base_only = runner.as_reference = False
        return runner

    @property
    def whole(self) -> AdaptedView:
        """The view with every adaptation."""
        return self.views.get(frozenset(), self.shown)

    def every_view(self) -> list[AdaptedView]:
        """Return the views that calls may run: the shown one and all others created so far."""
        return list({id(view): view for view in (self.shown, *self.views.values())}.values())

    def relower(self) -> None:
        """Generate all code again, including that of the views."""
        shown = self.shown
        try:
            for view in [*(view for view in self.every_view() if view is not shown), shown]:
                self.shown = view
                super().relower()
        finally:
            self.shown = shown

    def adaptations(self, names: tuple[str, ...]) -> frozenset[str]:
        """Return the adaptations with these names and the members of compositions with these names."""
        spec = self.compilation.spec
        names = as_names(names) if names else ()
        resolved: set[str] = set()
        known = [*spec.owners, *([TRAIN] if spec.train else [])]
        for name in names:
            composed = next((c.members for c in spec.compose if c.name == name), None)
            if composed is None and name not in known:
                raise unknown_name("adaptation", name, known)
            resolved |= self.adaptations(tuple(composed)) if composed is not None else {name}
        return frozenset(resolved)

    def show(self, off: frozenset[str]) -> None:
        """Show the view without the given adaptations."""
        if off == self.shown.off:
            return
        if off not in self.views and is_traced():
            raise GraftError("GC031", "no graph yet for these adaptations; call the model with them before compiling")
        self.shown = self._known_view(off)

    def _known_view(self, off: frozenset[str]) -> AdaptedView:
        """Return the view without the given adaptations, which is created when it is first requested."""
        views = self.views
        if off not in views:
            with exclusive():
                views.setdefault(self.shown.off, self.shown)
                views[off] = self._view(off)
        return views[off]

    def _view(self, off: frozenset[str]) -> AdaptedView:
        """Return a new view without the given adaptations; the shown view does not change."""
        spec = leaving(self.compilation.spec, off, train=TRAIN not in off)
        compilation = recompile(self.compilation, spec, dict(adapter_values(self.store)))
        every = self.everything
        left = {str(a.name) for a in spec.adapt} | {str(c.name) for c in spec.compose}
        kept = Steerings(*({n: v for n, v in table.items() if n in left} for table in tables_of(every)))
        tables = Tables(self.store)
        try:
            for fqn, tensor in compilation.store.adapters():
                if fqn not in self.store:  # constants of adaptations that now read a base weight directly
                    tables.put(fqn, self.here(tensor), persistent=False)
            return self.view_of(over(compilation, self.compilation), kept, off)
        except BaseException:
            tables.undo()
            raise

    def view_of(self, compilation: Compilation, steering: Steerings, off: frozenset[str]) -> AdaptedView:
        """Return a view with its own code for a Compilation over the same tensors; other threads may call this."""
        beside = copy.copy(self)
        beside.shown = AdaptedView(compilation, {}, f"{next(_LABELS)}: ", off, steering)
        for key in (compilation.key("train"), compilation.key("eval")):
            beside.install(key, beside.as_run(key))
        return beside.shown

    def here(self, tensor: Tensor) -> Tensor:
        """Return a new tensor on the model's device."""
        moved = tensor.detach().to(self.device)
        return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _trains(key: ProgramKey) -> bool:
    return key.mode != "eval" and key.stage == "adapted"
