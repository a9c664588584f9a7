"""Compiled: the adapted model as an `nn.Module` that behaves like the model it came from."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, NoReturn, ParamSpec, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from graftc.compiler.compilation import Compilation
from graftc.compiler.derived import program_of
from graftc.compiler.interface import ExampleInputs, Interface, config_of, dtype_of
from graftc.compiler.isolation import exclusive, is_traced, isolated
from graftc.compiler.pipeline import signature_for
from graftc.compiler.signature import split
from graftc.compiler.snapshot import adapter_tensors
from graftc.passes.core.blocks import Root, Runner
from graftc.passes.core.containers import OWN, constant, plain_attributes
from graftc.passes.core.gathered import copy_whole, gathered
from graftc.passes.core.keys import Entry, Modes, ProgramKey, Signature
from graftc.passes.core.program import Program
from graftc.passes.core.store import Store
from graftc.passes.core.updates import as_source
from graftc.passes.core.windows import wanted
from graftc.passes.cut import FLAG, cut_at_hidden_state
from graftc.runtime.base_model import install_base_model
from graftc.runtime.checkpointing import Checkpointed
from graftc.runtime.choosing import Choosing, with_choices
from graftc.runtime.combine import Combining
from graftc.runtime.ecosystem import Ecosystem, refuse_pickling
from graftc.runtime.inspection import Inspected
from graftc.runtime.selecting import Selecting
from graftc.runtime.state import Stateful
from graftc.specs.arguments import as_mapping, as_path, kind_of
from graftc.specs.compose import Parallel
from graftc.specs.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.compiler.certify import Certificate
    from graftc.compiler.report import Report
    from graftc.runtime.merged import Merged
    from graftc.runtime.partial import Partial

P = ParamSpec("P")
R = TypeVar("R")


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


@dataclass(frozen=True)
class _FlatCall:
    """A call that wants the flat outputs of a graph."""

    key: ProgramKey
    present: Mapping[str, Any]


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
            raise GraftError(
                "GC033",
                f"the graphs were captured in {runner.dtype} and cannot run in {moved.dtype}",
                hint=f"load the base model in {moved.dtype} and compile that",
            )
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
        vars(copied).update(copy.deepcopy(vars(self), memo))
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


class ModelRunner(Runner):
    """A Runner with the interface of a source model: inputs by name or position, the model's own output class.

    Args:
        compilation: Programs, and the source model's interface.
        store: the tensors to run on.
    """

    config: Any

    def __init__(self, compilation: Compilation, store: Store) -> None:
        super().__init__(store)
        model = compilation.model
        self._compilation = compilation
        self._interface = Interface(model)
        self._dtype = dtype_of(model)
        self.constants = plain_attributes(model)
        names = self._interface.parameters
        self.main_input_name = getattr(model, "main_input_name", names[0] if names else "")
        if (config := config_of(model)) is not None:
            self.config = copy.deepcopy(config)

    def adopt(self, module: Root) -> None:
        """See `Runner.adopt`."""
        super().adopt(module)
        self._base_model = install_base_model(self._store, self._compilation.model, self.hidden)
        self._start_in_modes(module)

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
            GraftError: GC031 for inputs that cannot be captured.
        """
        if args and isinstance(args[0], _FlatCall):
            return self._flat(args[0])
        chosen = {name: kwargs.pop(name) for name in self._compilation.controls if name in kwargs}
        present, plain = self._interface.read(self._interface.named(args, kwargs))
        if self._compilation.controls:
            present = with_choices(self._compilation, present, chosen)
        return self._outputs_of(self.ready(present), present, plain)

    def hidden(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The last hidden state of a call, ``[batch, sequence, hidden]``, without the head: ``last_hidden_state``
        of the source model's base model.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, and where the model returns no hidden states.
        """
        present, plain = self._interface.read({**self._interface.named(args, kwargs), FLAG: True})
        if self._compilation.controls:
            present = with_choices(self._compilation, present, {})
        return self._outputs_of(self.ready(present, "hidden"), present, plain)

    def _outputs_of(self, key: ProgramKey, present: Mapping[str, Any], plain: bool) -> Any:
        outputs = self._programs[key].outputs.build(self._results(key, present))
        return outputs.to_tuple() if plain and hasattr(outputs, "to_tuple") else outputs

    def _results(self, key: ProgramKey, present: Mapping[str, Any]) -> tuple[Any, ...]:
        """Flat outputs of a call."""
        return self.run(key, present)

    def ready(self, present: Mapping[str, Any], entry: Entry = "forward") -> ProgramKey:
        """The key under which `run` has code for a call's tensors and flags; it is captured where it is missing.

        Raises:
            GraftError: GC031 where it cannot be.
        """
        signature = self._compilation.find(present)
        key = self.key(signature, self._mode(signature), entry) if signature is not None else None
        if key is None or key not in self._roots:
            if is_traced():
                tensors, flags = split(present)
                names = ", ".join([*tensors, *(name for name, _ in flags)])
                raise GraftError("GC031", f"{names} have no graph yet; call the model once before compiling it")
            with exclusive():
                signature = signature_for(self._compilation, present)
                key = self.key(signature, self._mode(signature), entry)
                if key not in self._roots:
                    self.install(key, self._program_of(key))
        return key

    def _mode(self, signature: Signature) -> Modes:
        """The mode that the modules are in; code of `torch.compile` looks at that of the whole model."""
        if is_traced():
            return "train" if self.training else "eval"
        paths = self._compilation.signatures[signature].moded
        off = frozenset(path for path in paths if not self._store.container(path).training)
        if self.training:
            return off or "train"
        return off if len(off) < len(paths) else "eval"

    def shared(self) -> list[Any]:
        """What a copy of the module has in common with it: Graphs, which hold no tensors, and the source model."""
        compilation = self._compilation
        found: list[Any] = [self._interface, *self._programs.values()]
        if compilation.store is not self._store:
            return [*found, compilation]
        found += [compilation.model, compilation.source, compilation.spec, compilation.values, compilation.known]
        found += [*compilation.programs.values(), *compilation.signatures.values()]
        return [*found, *(site for r in compilation.main.resolved for site, _ in r.sites)]

    def copied(self) -> None:
        """Called when the module has been copied, on the copy's Runner."""

    def in_eval(self, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """Flat outputs of the first signature in eval mode, whatever mode the model is in."""
        present = {**inputs, **dict(self._compilation.program("train", "base").flags)}
        present = with_choices(self._compilation, present, {})
        with in_eval_mode(self.module):
            call = _FlatCall(self.ready(present), present)
            # Hooks of the module gather what is sharded; others are not told of calls that nobody made.
            sharded = hasattr(type(self.module), "unshard")
            found: tuple[Any, ...] = self.module(call) if sharded else self._flat(call)
            return found

    def _flat(self, call: _FlatCall) -> tuple[Any, ...]:
        return self.run(call.key, call.present)

    def key(self, signature: Signature, mode: Modes, entry: Entry = "forward") -> ProgramKey:
        """The key of what a call runs."""
        return ProgramKey(entry, mode, signature)

    def _program_of(self, key: ProgramKey) -> Program:
        if key.entry == "hidden":
            from transformers.modeling_outputs import BaseModelOutput

            return cut_at_hidden_state(self._program_of(key._replace(entry="forward")), BaseModelOutput)
        return program_of(self._compilation, key)

    @isolated()
    def export(
        self,
        path: str | Path,
        format: Literal["onnx", "pt2"] = "onnx",
        example_inputs: ExampleInputs | None = None,
        *,
        inputs: Sequence[str] = (),
        force: bool = False,
    ) -> Path:
        """Export the model in eval mode: a compiled one with its adapters, experts averaged, a merged one folded, with
        its certificate in the metadata.

        The tensors of ``inputs`` are no constants of the graph, but inputs by their full names, so that one file serves
        every adaptation of these shapes; in ``.pt2`` they are one keyword, ``adapter_tensors``, a mapping of names to
        tensors. Their values lie beside it, in ``<file>.<adaptation>.safetensors``.

        Args:
            path: the file to write.
            format: ``"onnx"`` or ``"pt2"``.
            example_inputs: a call whose signature is exported, by name or in order; by default the one that the model
                was compiled with. Values of tensors do not matter.
            inputs: names of adaptations that are in the graph.
            force: replace what is there.

        Raises:
            GraftError: GC031 for example inputs that have no graph, GC060 when the exporter or the check of its result
                fails, GC061 without the ``export`` extra, GC063 when ``path`` exists, GC064 when it cannot be written,
                GC065 for an input of which the graph reads nothing, GC091 for one that there is not.
        """
        return self._export(path, format, example_inputs, inputs, getattr(self, "certificate", None), force)

    def _export(
        self,
        path: str | Path,
        format: Literal["onnx", "pt2"],
        example_inputs: ExampleInputs | None,
        inputs: Sequence[str],
        certificate: Certificate | None,
        force: bool,
    ) -> Path:
        from graftc.runtime.export import export_model

        simplest = self._deployed()
        if simplest is not self:
            return simplest._export(path, format, example_inputs, inputs, certificate, force)
        signature = self._compilation.main.signature
        if example_inputs is not None:
            examples = self._interface.examples(example_inputs)
            chosen = {n: v for n, v in examples.items() if n in self._compilation.controls}
            own = {n: v for n, v in examples.items() if n not in chosen}
            present = with_choices(self._compilation, self._interface.read(own)[0], chosen)
            signature = signature_for(self._compilation, present)
        return export_model(self, as_path(path), format, signature, inputs=inputs, certificate=certificate, force=force)

    def _deployed(self) -> ModelRunner:
        """What an export writes."""
        return self


class CompiledRunner(Ecosystem, Stateful, Inspected, Checkpointed, Choosing, Combining, Selecting, ModelRunner):
    """All that a `Compiled` does."""

    _keys_to_ignore_on_save = None

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """Every tensor that graftc added and that has to be kept, by its full name, detached: parameters, and what
        controllers remember."""
        return {name: gathered(tensor) for name, tensor in adapter_tensors(self._store)}

    def load_adapter_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy adapter tensors in; names and shapes must be those of `adapter_state_dict`.

        Raises:
            GraftError: GC053 for missing, unknown or misshapen tensors, and for those of other rows than were chosen
                here, GC073 for what is no mapping of tensors; nothing is copied then.
        """
        as_mapping(tensors, "adapter tensors", Tensor)
        own = dict(adapter_tensors(self._store))
        wrong = sorted(own.keys() ^ tensors.keys())
        wrong += [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
        if wrong:
            raise GraftError("GC053", f"the adapter tensors do not fit: {', '.join(wrong[:5])}")
        other = sorted(n for n in self._store.settled if not torch.equal(own[n].cpu(), tensors[n].cpu()))
        if other:
            message = f"the graphs were made by other numbers: {', '.join(other[:5])}"
            raise GraftError("GC053", message, hint="compile with the seed and the base that the tensors are from")
        with torch.no_grad():
            for name, tensor in tensors.items():
                copy_whole(own[name], tensor)

    @isolated()
    def save(
        self,
        path: str | Path,
        *,
        force: bool = False,
        base: str | None = None,
        certify: bool = True,
        full: bool = False,
    ) -> Path:
        """Write an artifact: spec, places, graphs without weights, adapter tensors, and where the base is.

        The base's own weights are not in it. `graftc.load` reads it back.

        Args:
            path: the folder to make; it is complete when it appears.
            force: replace an artifact that is there, in one step.
            base: where the base is, as the command line takes it; by default what transformers knows of the model.
            certify: fold what folds, and put the certificate in.
            full: recognise the base by all its values, not by a sample of each tensor.

        Raises:
            GraftError: GC063 when something else is there, GC064 when it cannot be written.
        """
        from graftc.runtime.artifact.places import is_ours
        from graftc.runtime.artifact.write import certificate_of, require_values, save
        from graftc.runtime.files import check_destination

        require_values(self)
        place = as_path(path)
        check_destination(place, force=force, replaceable=is_ours)
        self.warn_of_unsteered()
        certificate, kept = certificate_of(self) if certify else (None, {})
        save(self, place, force=force, base=base, certificate=certificate, kept=kept, full=full)
        return place

    def _deployed(self) -> ModelRunner:
        """See `ModelRunner`. Adaptations are in their simplest form."""
        from graftc.runtime.deployed import deployed

        return deployed(self)

    @isolated()
    def merge(self, budget: float | None = None, *, progress: Callable[[float], None] | None = None) -> Merged:
        """Fold every adaptation into base weights and certify the result; this model stays as it is.

        Args:
            budget: largest allowed absolute difference of outputs; by default the spec's, or a bound by dtype.
            progress: is told how much of the folding is done, from 0 to 1, tensor by tensor.

        Raises:
            GraftError: GC050 naming what cannot fold, GC022 for tied weights, GC051 over budget, GC073 for a budget
                that is no number.
        """
        from graftc.runtime.merged import merge

        self.warn_of_unsteered()
        return merge(self, budget, progress or (lambda _: None))

    @isolated()
    def merge_partially(self, budget: float | None = None) -> Partial:
        """Fold what folds, certify that, and compile the rest on a base that has the folded weights. What was trained
        with experts that are drawn becomes the simpler adaptation with their mean, whether anything folds or not.

        Args:
            budget: as for `merge`.

        Raises:
            GraftError: GC051 over budget, GC052 when the class has no place for a folded tensor.
        """
        from graftc.runtime.partial import merge_partially

        return merge_partially(self, budget)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `ModelRunner`.

        Raises:
            GraftError: GC044 where a base tensor has been unfrozen; code of `torch.compile` takes no notice.
        """
        if torch.is_grad_enabled() and not is_traced():
            self._check_frozen()
        return super().call(args, kwargs)

    def _check_frozen(self) -> None:
        for table, name, path in self._frozen:
            tensor = table[name]
            if tensor.requires_grad and not wanted(tensor):
                message = f"{path} wants a gradient, and it is the source model's"
                module = path.rpartition(".")[0] or path
                hint = f"put train: [{module}] into the spec, which trains a copy of it, or freeze it again"
                raise GraftError("GC044", message, hint=hint)

    @cached_property
    def _frozen(self) -> list[tuple[dict[str, Any], str, str]]:
        """Where base parameters are: their table, their name in it, and their full name."""
        parameters = [name for name, tensor in self._store.base() if isinstance(tensor, nn.Parameter)]
        split = ((name, *name.rpartition(".")) for name in parameters)
        return [(self._store.owner(path)._parameters, last, name) for name, path, _, last in split]

    def copied(self) -> None:
        """See `ModelRunner`. What steers a training, and how far it is, is copied as well."""
        vars(self).pop("_frozen", None)
        self._watch()
        self._pause()

    @contextmanager
    def disabled(self, *names: Any) -> Iterator[None]:
        """Inside, the model computes what its base computes.

        Raises:
            GraftError: GC073 where names of adaptations are given: all are left out.
        """
        if names:
            hint = "leave out the names; compiled.activate(name) and fix(name) choose from a bank"
            raise GraftError("GC073", f"disabled() leaves out every adaptation, not {names[0]!r} only", hint=hint)
        self._base_only = True
        try:
            yield
        finally:
            self._base_only = False

    _base_only = False

    def key(self, signature: Signature, mode: Modes, entry: Entry = "forward") -> ProgramKey:
        """See `ModelRunner.key`."""
        return ProgramKey(entry, mode, signature, "source" if self._base_only else "adapted")

    def _program_of(self, key: ProgramKey) -> Program:
        found = super()._program_of(key)
        ours = key.stage == "source" and key.entry == "forward"
        return as_source(found, self._store.updated) if ours else found


class Compiled(ModelRoot):
    """The adapted model: same inputs, same outputs, loss from ``labels``; only what the spec says trains.

    Made by `graftc.compile`. ``train()`` and ``eval()`` switch between two graphs over one set of tensors. An input
    that was absent so far is captured at its first use.

    The names below are graftc's, whatever the source model's children are called. All else that graftc offers gives
    way to a child, a parameter or a buffer of its name, and is an attribute of `runner_of(compiled)` as well.
    """

    _graftc: CompiledRunner

    save = Published(CompiledRunner.save)
    merge = Published(CompiledRunner.merge)
    merge_partially = Published(CompiledRunner.merge_partially)
    export = Published(CompiledRunner.export)
    disabled = Published(CompiledRunner.disabled)
    adapter_state_dict = Published(CompiledRunner.adapter_state_dict)
    load_adapter_state_dict = Published(CompiledRunner.load_adapter_state_dict)
    full_state_dict = Published(CompiledRunner.full_state_dict)
    begin = Published(CompiledRunner.begin)
    extra_loss = Published(CompiledRunner.extra_loss)
    after_step = Published(CompiledRunner.after_step)
    callback = Published(CompiledRunner.callback)
    select = Published(CompiledRunner.select)
    advance = Published(CompiledRunner.advance)
    activate = Published(CompiledRunner.activate)
    train_only = Published(CompiledRunner.train_only)
    explain = Published(CompiledRunner.explain)

    def get_extra_state(self) -> Tensor:
        """See `torch.nn.Module.get_extra_state`: what the tensors of a state dict belong to, as ``uint8[bytes]``."""
        return self._graftc.record()

    def set_extra_state(self, state: Any) -> None:
        """Nothing to do: it has been read before the first tensor was loaded."""

    @property
    def report(self) -> Report:
        """What every adaptation adds: sites, parameters, bytes, FLOPs per token."""
        return self._graftc.report

    def _get_name(self) -> str:
        return type(self._graftc._compilation.model).__name__


def compiled_class(model: nn.Module, controls: Iterable[str] = ()) -> type[Compiled]:
    """A subclass of `Compiled` whose ``forward`` has the source model's signature, which trainers look at, and inputs
    of banks besides."""
    signature = inspect.signature(type(model).forward)
    kind = inspect.Parameter.KEYWORD_ONLY
    known = list(signature.parameters.values())
    rest = [p for p in known if p.kind is inspect.Parameter.VAR_KEYWORD]
    own = [inspect.Parameter(name, kind, default=None) for name in controls]
    signature = signature.replace(parameters=[*(p for p in known if p not in rest), *own, *rest])

    def forward(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        return self._graftc.call(args, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = type(model).forward.__doc__
    # Trainers look for "QuestionAnswering" and the like in the name of a class.
    name = f"Compiled{type(model).__name__}"
    return type(name, (Compiled,), {"forward": forward, "__module__": __name__})


@exclusive()
def make_compiled(compilation: Compilation) -> Compiled:
    """The module for a Compilation, its first signature lowered in both modes."""
    given = [n for n, c in compilation.controls.items() if not isinstance(c, Parallel)]
    runner = CompiledRunner(compilation, compilation.store)
    compiled = compiled_class(compilation.model, given)(runner)
    for key in (compilation.key("train"), compilation.key("eval")):
        runner.install(key, compilation.programs[key])
    runner._watch()
    if compilation.spec.checkpoint == "layers":
        runner.gradient_checkpointing_enable()
    return compiled
