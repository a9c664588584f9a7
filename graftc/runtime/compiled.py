"""Compiled: the adapted model as an `nn.Module` that behaves like the model it came from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, cast

import torch
from torch import Tensor, nn

from graftc.compiler.cached import cannot_be_cached
from graftc.compiler.capture.interface import config_of
from graftc.compiler.capture.isolation import exclusive, is_traced, isolated
from graftc.compiler.capture.past import USE_CACHE
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.summary import summary
from graftc.compiler.inspect.tree import model_tree
from graftc.compiler.pipeline import recompile
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.ir.functions import UnlikeBodyError, calls
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, Modes, ProgramKey, Signature
from graftc.passes.core.ir.updates import as_source
from graftc.passes.core.method.base_gradients import wanted
from graftc.passes.core.weights.sharding import computes_in, is_unit
from graftc.runtime.deploy.combine import Combining
from graftc.runtime.deploy.convert import Converting
from graftc.runtime.export.exporting import Exporting
from graftc.runtime.interop.wrapping import refuse_wrapping
from graftc.runtime.model.checkpointing import Checkpointed
from graftc.runtime.model.choosing import Choosing
from graftc.runtime.model.ecosystem import Ecosystem
from graftc.runtime.model.editing import Editing
from graftc.runtime.model.generation import LOOKUP, stand_in
from graftc.runtime.model.inspection import Inspected
from graftc.runtime.model.lowered import Lowering
from graftc.runtime.model.reference_model import Referring
from graftc.runtime.model.runner import M, ModelRoot, Published
from graftc.runtime.model.scoring import TokenScoring, answering
from graftc.runtime.model.sharded import in_every_process, written_once
from graftc.runtime.model.views import with_every_adaptation
from graftc.runtime.presenting import Presented
from graftc.runtime.progress import during
from graftc.runtime.training.selecting import Selecting
from graftc.specs.compose import Parallel
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import as_names, as_path
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.specs.methods.prefix import PrefixSpec
from graftc.specs.options.exports import FileType

if TYPE_CHECKING:
    from graftc.compiler.folding.requantise import BaseForm
    from graftc.compiler.inspect.report import Report
    from graftc.compiler.inspect.snapshot import Snapshot
    from graftc.compiler.roles.structure import Structure
    from graftc.runtime.deploy.merged import Merged
    from graftc.runtime.deploy.merged_tensors import MergedTensors
    from graftc.runtime.deploy.partial import Partial


class CompiledRunner(
    Editing,
    Ecosystem,
    Presented,
    Inspected,
    Checkpointed,
    Lowering,
    TokenScoring,
    Choosing,
    Combining,
    Converting,
    Selecting,
    Referring,
    Exporting,
):
    """All that a `Compiled` does."""

    _keys_to_ignore_on_save = None

    @isolated()
    @during("saving")
    @written_once
    @with_every_adaptation
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

        The base's own weights are not in it. `graftc.load` reads it back. Of a sharded model every process calls it,
        and the first one writes.

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
        from graftc.runtime.artifact.write import require_values, save
        from graftc.runtime.deploy.merged import certificate_of
        from graftc.runtime.files import check_destination

        require_values(self)
        place = as_path(path)
        check_destination(place, force=force, replaceable=is_ours)
        self.warn_of_unsteered()
        certificate, kept = certificate_of(self) if certify else (None, {})
        save(self, place, force=force, base=base, certificate=certificate, kept=kept, full=full)
        return place

    def _generating(self, kwargs: Mapping[str, Any]) -> Any:
        """See `Generating`. Prefixes and virtual tokens are the first contents of the cache, where they can be."""
        from graftc.runtime.model.initial_cache import initial_cache

        if self._base_only:
            if not cannot_be_cached(self._active):
                return self._stand_in
            every = (*self._active.spec.owners, *([TRAIN] if self._active.spec.train else []))
            return stand_in(self.beside(every), self._compilation.model)
        config = kwargs.get("generation_config")
        # Assisted generation counts its masks by the tokens of the text alone.
        ruled_out = any(kwargs.get(name) is not None for name in ("assistant_model", LOOKUP))
        ruled_out = ruled_out or getattr(config, LOOKUP, None) is not None
        ruled_out = ruled_out or False in (kwargs.get(USE_CACHE), getattr(config, USE_CACHE, None))
        if ruled_out or (initial := initial_cache(self)) is None:
            return self._stand_in
        made = stand_in(self.beside(initial.names), self._compilation.model)
        vars(made).update(_graftc_initial=initial, _graftc_whole=self)
        return made

    def warm_up(self, batch: Mapping[str, Any], *, generate: bool = False) -> None:
        """Do now what the first calls would do: capture their graphs, hold them against the source model, make code,
        and plan what a training step keeps. It takes as long as it would then, with progress, and nothing is trained:
        parameters, gradients, buffers and random states are as before.

        Of a model in training mode the call is made ready in eval mode too. Calls with the inputs and flags of the
        batch start at once from then on; a call with others is captured when it comes.

        Args:
            batch: arguments of a call by name, such as a batch of the data loader with its ``labels``. Of tensors the
                names, types and sizes count.
            generate: also what `generate` needs, for the prompt and for the tokens behind it: two tokens are generated
                behind the first four of the batch's first text. Prompts with an ``attention_mask`` have graphs of their
                own, so give one where yours have one.

        Raises:
            GraftError: GC031 for inputs that cannot be captured, GC073 for no mapping or, with ``generate``, no
                ``input_ids``, and whatever `generate` raises.
        """
        from graftc.runtime.training.warm_up import warm_up

        warm_up(self, batch, generate=generate)

    @property
    def begins(self) -> int:
        """See `Generating`."""
        if self._base_only:
            return 0
        specs = [resolved.spec for resolved in self._active.places().resolved]
        shifted = [s.length for s in specs if isinstance(s, PrefixSpec) and s.positions == "shifted"]
        return sum([*shifted, *(run.length for spec in specs for run in spec.virtual_tokens())])

    def _deployed(self) -> Exporting:
        """See `ModelRunner`. Adaptations are in their simplest form."""
        from graftc.runtime.deploy.deployed import deployed

        return deployed(self)

    def _export_peft(self, path: Path, force: bool, server: str | None = None, max_rank: int | None = None) -> Path:
        """See `Exporting`."""
        from graftc.runtime.artifact.write import require_values
        from graftc.runtime.deploy.deployed import deployed
        from graftc.runtime.interop.peft.exporting import export_peft, prepared
        from graftc.runtime.interop.peft.plain import plain
        from graftc.runtime.interop.peft.servers import require_served, server_of

        require_values(self)
        limits = None if server is None else server_of(server)
        compilation = deployed(self).compilation
        made = prepared(compilation)
        if limits is not None:
            made = plain(made, compilation)
            require_served(limits, made.config, made.tensors, max_rank=max_rank)
        export_peft(made, path, force=force)
        return path

    def _export_gguf(self, path: Path, dtype: FileType, force: bool) -> Path:
        """See `Exporting`."""
        from graftc.runtime.artifact.write import require_values
        from graftc.runtime.deploy.deployed import deployed
        from graftc.runtime.export.gguf.adapter import export_adapter, plain_of

        require_values(self)
        adapter = plain_of(deployed(self).compilation)
        return export_adapter(adapter, config_of(self.compilation.source), path, dtype=dtype, force=force)

    def sibling(
        self,
        spec: Spec,
        values: Mapping[str, Tensor],
        model: nn.Module | None = None,
        axes: Sequence[Axis] | None = None,
    ) -> Compiled:
        """Another spec compiled for the same base and first signature, where this model is.

        Args:
            spec: what to adapt there.
            values: adapter tensors to start from, by name.
            model: another base; by default the same.
            axes: inputs of other element types, where the base is of another one.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraftWarning)  # they have been given when this one was compiled
            made = recompile(self._compilation, spec, values, model, axes)
        compiled: Compiled = make_compiled(made).to(self.device)
        return compiled

    def over(self, compilation: Compilation) -> CompiledRunner:
        """The model of another Compilation: the same Programs over another Store."""
        return make_compiled(compilation)._graftc

    @isolated()
    @in_every_process
    @with_every_adaptation
    def merge(
        self,
        names: str | Sequence[str] | None = None,
        *,
        budget: float | None = None,
        progress: Callable[[float], None] | None = None,
        dtype: torch.dtype | None = None,
        base: BaseForm | None = None,
        allow_unchanged: bool = False,
    ) -> Merged:
        """See `Compiled.merge`."""
        from graftc.runtime.deploy.merged import merge

        self.warn_of_unsteered()
        chosen = self if names is None else self.alone(as_names(names))
        told = progress or (lambda _: None)
        return merge(chosen, budget, told, dtype=dtype, base=base, allow_unchanged=allow_unchanged)

    @isolated()
    @in_every_process
    @with_every_adaptation
    def merge_partially(
        self,
        budget: float | None = None,
        *,
        only: Sequence[str] | None = None,
        base: BaseForm | None = None,
        allow_unchanged: bool = False,
    ) -> Partial:
        """See `Compiled.merge_partially`."""
        from graftc.runtime.deploy.partial import merge_partially

        return merge_partially(self, budget, only=only, base=base, allow_unchanged=allow_unchanged)

    @isolated()
    @in_every_process
    @with_every_adaptation
    def merged_state_dict(self, *, digests: bool = False) -> MergedTensors:
        """The tensors of the merged model one after the other, for trainers that push weights to an inference engine.

        Each is folded when it is asked for, always from the base's own values, so that merging again and again adds up
        no rounding: the same adapters give the same bits, and the base is never written. At any time one tensor is
        there, or those that are folded together. Names are those of the source model's state dict, tied ones included.
        What folding does not change is the base's own tensor: whoever writes to it has to copy it first. Packed weights
        are given by their values, in full precision. No graph is
        made and nothing is certified or saved.

        Args:
            digests: also work out the SHA-256 of each tensor, which is then in ``digests`` of what is returned, for
                the receiver to compare.

        Returns:
            An iterator of ``(name, tensor)``, in the base's element types and where the model is.

        Raises:
            GraftError: GC050 naming what cannot fold, GC022 for tied weights, GC051 where an adapter has values that
                are not finite; on the way GC051 for such a tensor, GC052 for a bias that the class has no place for.
        """
        from graftc.runtime.deploy.merged_tensors import MergedTensors

        self.warn_of_unsteered()
        return MergedTensors(self, digests=digests)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `ModelRunner`.

        Raises:
            GraftError: GC044 where a base tensor has been unfrozen, GC130 where FSDP2 computes in another type than the
                graphs; code of `torch.compile` takes no notice.
        """
        if is_unit(self.module) and computes_in(self.module) not in (None, self.dtype):
            own, other = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, computes_in(self.module)))
            message = f"FSDP2 computes in {other}, and the graphs were captured in {own}"
            raise GraftError("GC130", message, hint=f"load the base in {other}, or leave out param_dtype")
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
        super().copied()
        vars(self).pop("_frozen", None)
        self._watch()
        self._pause()

    @contextmanager
    def disabled(self, *names: str) -> Iterator[None]:
        """Inside, the model computes what its base computes, or, with names, what it computes without these. With
        ``parallel`` it gives the base's rows once for each adaptation, as many as a call gives outside.

        Leaving out some adaptations takes as long as compiling without a capture at its first use, and next to nothing
        after that.

        Args:
            names: adaptations or compositions to leave out; ``trained`` is the ``train:`` list. By default all.

        Raises:
            GraftError: GC091 where there is no such adaptation, GC036 for a part of a composition.
        """
        if names:
            with self.without(names):
                yield
            return
        with self.base_only():
            yield

    def key(self, signature: Signature, mode: Modes, entry: Entry = "forward") -> ProgramKey:
        """See `ModelRunner.key`."""
        return ProgramKey(entry, mode, signature, "source" if self._base_only else "adapted")

    def _program_of(self, key: ProgramKey) -> Program:
        return self._with_updates(key, super()._program_of(key))

    def _with_updates(self, key: ProgramKey, program: Program) -> Program:
        ours = key.stage == "source" and key.entry == "forward"
        return as_source(program, self._store.updated) if ours else program

    def _as_run(self, key: ProgramKey) -> Program:
        """See `ModelRunner._as_run`. Layers that are alike call functions, until hooks want each."""
        found = self._active.table.programs.get(key)
        if found is None or not calls(found.graph) or self.hearing.hooked or self.hearing.everywhere:
            return super()._as_run(key)
        self._active.signatures[key.signature].add_constants(self._store)
        return self._with_updates(key, found)

    def write_out(self, key: ProgramKey) -> None:
        """See `Runner.write_out`."""
        if calls(self._programs[key].graph):
            self.install(key, self._program_of(key))

    def install(self, key: ProgramKey, program: Program) -> None:
        """See `ModelRunner.install`. Calls that are not those of one block are written out."""
        try:
            super().install(key, program)
        except UnlikeBodyError:
            super().install(key, self._program_of(key))


class Compiled(ModelRoot, Generic[M]):
    """The adapted model: same inputs, same outputs, loss from ``labels``; only what the spec says trains.

    Made by `graftc.compile`; ``Compiled[M]`` is that of a source of class ``M``. A call gives what ``M.forward`` gives,
    in its own output class; as of every `torch.nn.Module`, a type checker sees `Any` there. ``train()`` and ``eval()``
    switch between two graphs over one set of tensors. An input that was absent so far is captured at its first use.

    The names below are graftc's, whatever the source model's children are called. All else that graftc offers gives
    way to a child, a parameter or a buffer of its name, and is an attribute of `runner_of(compiled)` as well.
    """

    _graftc: CompiledRunner

    save = Published(CompiledRunner.save)
    export = Published(CompiledRunner.export)
    disabled = Published(CompiledRunner.disabled)
    reference = Published(CompiledRunner.reference)
    adapter_state_dict = Published(CompiledRunner.adapter_state_dict)
    load_adapter_state_dict = Published(CompiledRunner.load_adapter_state_dict)
    full_state_dict = Published(CompiledRunner.full_state_dict)
    merged_state_dict = Published(CompiledRunner.merged_state_dict)
    begin = Published(CompiledRunner.begin)
    extra_loss = Published(CompiledRunner.extra_loss)
    after_step = Published(CompiledRunner.after_step)
    callback = Published(CompiledRunner.callback)
    select = Published(CompiledRunner.select)
    advance = Published(CompiledRunner.advance)
    activate = Published(CompiledRunner.activate)
    train_only = Published(CompiledRunner.train_only)
    explain = Published(CompiledRunner.explain)

    if TYPE_CHECKING:  # attributes of the Runner, which give way to a child of their name
        base_model: nn.Module
        generate: Callable[..., Any]
        warm_up: Callable[..., None]
        compilation: Compilation
        device: torch.device
        dtype: torch.dtype
        snapshot: Snapshot
        spec: Spec
        structure: Structure

    def merge(
        self,
        names: str | Sequence[str] | None = None,
        *,
        budget: float | None = None,
        progress: Callable[[float], None] | None = None,
        dtype: torch.dtype | None = None,
        base: BaseForm | None = None,
        allow_unchanged: bool = False,
    ) -> Merged[M]:
        """Fold every adaptation into base weights and certify the result; this model stays as it is.

        Args:
            names: fold these adaptations alone, with the ``train:`` list and added tokens; the others are left out, and
                nothing of them is in the result. `merge_partially` with ``only`` keeps them beside the new base.
            budget: largest allowed absolute difference of outputs; by default the spec's, or a bound by dtype.
            progress: is told how much of the folding is done, from 0 to 1, tensor by tensor.
            dtype: ``torch.float32`` widens a base in 16 bits first, so that rounding takes nothing of the update: the
                merged model, its folder and its certificate are in float32. By default the base's own.
            base: what becomes of a quantised base's packed weights. ``"full"``: all are in full precision, in
                the element type of the model, and the merged model is a plain one of the source's class.
                ``"requantized"``: those that change are packed again as they were, others keep their codes; the
                certificate has the measured error (`Certificate.requantised`), and ``budget`` is by default half of the
                largest output, 5 % with `int8`. There is no default: the fold is exact only in full precision.
            allow_unchanged: a merge that changes no tensor of the base is not an error.

        Raises:
            GraftError: GC050 naming what cannot fold, GC022 for tied weights, GC051 over budget, GC104 where no tensor
                changes, GC073 for a budget that is not a number and a dtype that is not wider; of ``names``, GC091 for
                an unknown one and GC036 for a part of a composition; GC165 for a quantised base where ``base`` is
                missing, GC166 where weights cannot be packed again.
        """
        options: Any = {"dtype": dtype, "base": base, "allow_unchanged": allow_unchanged}
        made = self._graftc.merge(names, budget=budget, progress=progress, **options)
        return cast("Merged[M]", made)

    def merge_partially(
        self,
        budget: float | None = None,
        *,
        only: Sequence[str] | None = None,
        base: BaseForm | None = None,
        allow_unchanged: bool = False,
    ) -> Partial[M]:
        """Fold what folds, certify that, and compile the rest on a base that has the folded weights. What was trained
        with experts that are drawn becomes the simpler adaptation with their mean, whether anything folds or not.

        Args:
            budget, base, allow_unchanged: as for `merge`.
            only: names of what is folded, ``trained`` for the ``train:`` list; the rest stays beside the new base,
                whether it would fold or not. By default all that folds.

        Raises:
            GraftError: GC051 over budget, GC052 when the class has no place for a folded tensor, GC104 where what folds
                changes no tensor; of ``only``, GC050 and GC022 for what does not fold and GC091 for an unknown name.
        """
        made = self._graftc.merge_partially(budget, only=only, base=base, allow_unchanged=allow_unchanged)
        return cast("Partial[M]", made)

    def get_extra_state(self) -> Tensor:
        """See `torch.nn.Module.get_extra_state`: what the tensors of a state dict belong to, as ``uint8[bytes]``."""
        return self._graftc.record()

    def set_extra_state(self, state: Any) -> None:
        """Nothing to do: it has been read before the first tensor was loaded."""

    @property
    def report(self) -> Report:
        """What every adaptation adds: sites, parameters, bytes, FLOPs per token."""
        return self._graftc.report

    def __repr__(self) -> str:
        """The source's modules; at each, what adaptations have there: the shape of the weight, the method, its rank (or
        what else says how large it is) and how many elements train. Equal layers are one; the last line has totals."""
        from graftc.runtime.model.printed import printed

        return printed(self._graftc._compilation, self, *self._graftc.get_nb_trainable_parameters())

    def _repr_html_(self) -> str:
        """For notebooks: the adaptations and what they train, and the tree of modules, folded."""
        own = self._graftc.snapshot
        return summary(own)._repr_html_() + model_tree(own)._repr_html_()

    def __setattr__(self, name: str, value: Any) -> None:
        """See `torch.nn.Module`. TRL puts a forward of its own in the place of a model's."""
        super().__setattr__(name, answering(self._graftc, value) if name == "forward" else value)

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


refuse_wrapping()


@exclusive()
def make_compiled(compilation: Compilation) -> Compiled:
    """The module for a Compilation, its first signature lowered in both modes."""
    given = [n for n, c in compilation.controls.items() if not isinstance(c, Parallel)]
    runner = CompiledRunner(compilation, compilation.store)
    compiled = compiled_class(compilation.model, given)(runner)
    for key in (compilation.key("train"), compilation.key("eval")):
        runner.install(key, runner._as_run(key))
    runner._watch()
    if compilation.spec.checkpoint == "layers":
        runner.gradient_checkpointing_enable()
    return compiled
