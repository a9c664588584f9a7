"""`Compiled`, the adapted model as an `nn.Module` that behaves like the source model.

Its features are implemented by plain objects that receive its Runner, each in its own file; `offered` lists them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, cast

import torch
from torch import Tensor, nn

from graftc.compat.modules import printed_as
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.requantise import BaseForm
from graftc.compiler.inspect.summary import summary
from graftc.compiler.inspect.tree import model_tree
from graftc.passes.core.ir.program_key import Mode
from graftc.records.report import Report
from graftc.runtime.export.exporting import Exporting
from graftc.runtime.interop.wrapping import refuse_wrapping
from graftc.runtime.model.printed import printed
from graftc.runtime.model.runner import M, ModelRoot, Published
from graftc.runtime.offered.runner import CompiledRunner as CompiledRunner
from graftc.runtime.offered.scoring import answering
from graftc.runtime.offered.state_dicts import StateDicts
from graftc.runtime.training.selecting import Selecting
from graftc.runtime.training.steering import TrainingSteering, watch_training
from graftc.specs.compose import Parallel

if TYPE_CHECKING:
    from graftc.compiler.inspect.snapshot import Snapshot
    from graftc.compiler.roles.structure import Structure
    from graftc.records.explanation import Explanation
    from graftc.runtime.deploy.merged import Merged
    from graftc.runtime.deploy.partial import Partial
    from graftc.runtime.deploy.tensor_stream import MergedTensors
    from graftc.runtime.offered.reference_model import ReferenceModel
    from graftc.specs.document import Spec


@printed_as(lambda compiled: type(compiled._graftc.compilation.model).__name__)
class Compiled(ModelRoot, Generic[M]):
    """The adapted model, with the source model's inputs and outputs, and a loss from ``labels``.

    Only the tensors that the spec trains require gradients. Instances are created by `graftc.compile`; ``Compiled[M]``
    is the type for a source of class ``M``. A call returns the same type of output as ``M.forward``; as for every
    `torch.nn.Module`, type checkers see its result as `Any`. ``train()`` and ``eval()`` switch between two
    graphs over one set of tensors. Each new set of inputs is captured when it is first used.

    The names below are always graftc's, whatever the names of the source model's children. Everything else that graftc
    offers gives way to a child, parameter or buffer with the same name, and is also an attribute of
    `runner_of(compiled)`.
    """

    _graftc: CompiledRunner

    adapter_state_dict = Published(StateDicts.adapter_state_dict)
    load_adapter_state_dict = Published(StateDicts.load_adapter_state_dict)
    full_state_dict = Published(StateDicts.full_state_dict)
    begin = Published(TrainingSteering.begin)
    extra_loss = Published(TrainingSteering.extra_loss)
    after_step = Published(TrainingSteering.after_step)
    callback = Published(TrainingSteering.callback)
    select = Published(Selecting.select)
    advance = Published(Selecting.advance)
    export = Published(Exporting.export)

    if TYPE_CHECKING:  # attributes of the Runner, which give way to a child of the same name
        base_model: nn.Module
        generate: Callable[..., Any]
        compilation: Compilation
        device: torch.device
        dtype: torch.dtype
        snapshot: Snapshot
        spec: Spec
        structure: Structure
        warm_up: Callable[..., None]

    def save(
        self,
        path: str | Path,
        *,
        force: bool = False,
        base: str | None = None,
        certify: bool = True,
        full: bool = False,
    ) -> Path:
        """Write an artifact: spec, places, graphs without weights, adapter tensors, and the location of the base.

        It does not contain the base's own weights. `graftc.load` reads it. For a sharded model, every process must call
        this method; the first one writes.

        Args:
            path: the folder to create; it is complete as soon as it appears.
            force: whether to replace an existing artifact, in one step.
            base: the base's location, in the form that the command line accepts; by default the one that transformers
                has recorded for the model.
            certify: whether to fold the adaptations that can be folded and include the certificate.
            full: whether to identify the base by all of its values instead of a sample from each tensor.

        Raises:
            GraftError: GC063 if the path is taken by something else, GC064 if the artifact cannot be written.
        """
        return cast(Path, self._graftc.save(path, force=force, base=base, certify=certify, full=full))

    def disabled(self, *names: str) -> AbstractContextManager[None]:
        """Run the block without the named adaptations, or with the base alone if none is named.

        With ``parallel``, the base's rows are returned once for each adaptation, so that calls return the same number
        of rows as outside the block.

        Leaving out a set of adaptations for the first time takes as long as compiling without a capture; after that, it
        costs next to nothing.

        Args:
            names: adaptations or compositions to leave out; ``trained`` is the ``train:`` list. By default all of them.

        Raises:
            GraftError: GC091 if there is no such adaptation, GC036 for a part of a composition.
        """
        return cast("AbstractContextManager[None]", self._graftc.disabled(*names))

    def reference(self) -> ReferenceModel:
        """Return a module that computes what the base computes, in eval mode, using this model's tensors.

        It serves as the reference model for DPO and KTO: ``DPOTrainer(compiled, ref_model=compiled.reference(), ...)``.
        No second model is in memory, and the module follows this model to another device.

        It has the base's config, ``base_model`` and ``get_output_embeddings()``, but no parameters.
        """
        return cast("ReferenceModel", self._graftc.reference())

    def activate(self, choice: str | int, bank: str | None = None) -> None:
        """Choose the adaptation for calls that do not choose one themselves.

        No graph changes, so the choice may differ from call to call.

        Args:
            choice: an adaptation's name, or the index of its slot.
            bank: the bank's name; needed only if there are several.

        Raises:
            GraftError: GC038 if there is no such slot, GC091 if there is no such bank.
        """
        self._graftc.activate(choice, bank)

    def train_only(self, *names: str) -> None:
        """Train only the named adaptations from now on, or all of them if none is named.

        The tensors of all others no longer require gradients, so that no optimiser changes them, not even by weight
        decay.

        Args:
            names: adaptations or compositions.

        Raises:
            GraftError: GC091 if there is no such adaptation.
        """
        self._graftc.train_only(*names)

    def explain(self, name: str, mode: Mode = "eval") -> Explanation:
        """Explain why a printed value, node, place or tensor is in the adapted graph; print the result to read it.

        Args:
            name: the name, as printed.
            mode: the mode of the graph.

        Raises:
            GraftError: GC091 if the name is unknown or ambiguous.
        """
        return cast("Explanation", self._graftc.explain(name, mode))

    def merged_state_dict(self, *, digests: bool = False) -> MergedTensors:
        """Return the merged model's tensors one by one, for trainers that push weights to an inference engine.

        Each tensor is folded when it is requested, always from the base's own values, so that repeated merging does not
        accumulate rounding: the same adapters give the same bits, and the base is never written to. At any time, only
        one folded tensor exists, or those that are folded together. Names are those of the source model's state dict,
        including tied ones. A tensor that folding does not change is the base's own: copy it before writing to it.
        Packed weights are returned as values in full precision. No graph is created, and nothing is certified or saved.

        Args:
            digests: whether to compute the SHA-256 of each tensor as well; the returned object's ``digests`` then
                contains the digests, so that the receiver can compare them.

        Returns:
            An iterator of ``(name, tensor)``, in the base's dtypes and on the model's device.

        Raises:
            GraftError: GC050 for adaptations that cannot be folded, GC022 for tied weights, GC051 if an adapter has
                non-finite values; during iteration, GC051 for a non-finite tensor, GC052 for a bias for which the class
                has no place.
        """
        return cast("MergedTensors", self._graftc.merged_state_dict(digests=digests))

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
        """Fold every adaptation into base weights and certify the result; this model is unchanged.

        Args:
            names: the only adaptations to fold, apart from the ``train:`` list and added tokens; the others are absent
                from the result. To keep them on top of the new base, use `merge_partially` with ``only``.
            budget: the maximum absolute difference allowed in outputs; by default the spec's, or a bound for the dtype.
            progress: a function that is called after each tensor with the completed fraction of the folding, from 0
                to 1.
            dtype: ``torch.float32`` first widens a 16-bit base, so that rounding loses nothing of the update: the
                merged model, its folder and its certificate are in float32. By default the base's own dtype.
            base: the form of a quantised base's packed weights in the result. ``"full"``: all are in full precision, in
                the model's dtype, and the merged model is a plain model of the source's class. ``"requantized"``:
                weights that change are packed again as before, others keep their codes; the certificate has the
                measured error (`Certificate.requantised`), and ``budget`` is by default half of the largest output, or
                5 % of it with `int8`. There is no default: the fold is exact only in full precision.
            allow_unchanged: whether to accept a merge that changes no tensor of the base.

        Raises:
            GraftError: GC050 for adaptations that cannot be folded, GC022 for tied weights, GC051 over budget, GC104 if
                no tensor changes, GC073 for a budget that is not a number or a dtype that is not wider; for ``names``,
                GC091 for an unknown name and GC036 for a part of a composition; GC165 for a quantised base if ``base``
                is missing, GC166 if weights cannot be packed again.
        """
        options = {"dtype": dtype, "base": base, "allow_unchanged": allow_unchanged}
        return cast("Merged[M]", self._graftc.merge(names, budget=budget, progress=progress, **options))

    def merge_partially(
        self,
        budget: float | None = None,
        *,
        only: Sequence[str] | None = None,
        base: BaseForm | None = None,
        allow_unchanged: bool = False,
    ) -> Partial[M, Compiled[M]]:
        """Fold the adaptations that can be folded, certify the fold, and compile the rest over the folded base.

        An adaptation that was trained with randomly drawn experts is replaced by a simpler one that uses their mean,
        whether or not anything is folded.

        Args:
            budget: as for `merge`.
            base: as for `merge`.
            allow_unchanged: as for `merge`.
            only: the names of the adaptations to fold, ``trained`` for the ``train:`` list; the rest stays on top of
                the new base, even if it could be folded. By default all that can be folded.

        Raises:
            GraftError: GC051 over budget, GC052 if the class has no place for a folded tensor, GC104 if the fold
                changes no tensor; for ``only``, GC050 and GC022 for adaptations that cannot be folded and GC091 for an
                unknown name.
        """
        partial = self._graftc.merge_partially(budget, only=only, base=base, allow_unchanged=allow_unchanged)
        return cast("Partial[M, Compiled[M]]", partial)

    def get_extra_state(self) -> Tensor:
        """Return a record of the spec, base and inputs to which a state dict belongs, as ``uint8[bytes]``.

        See `torch.nn.Module.get_extra_state`.
        """
        return StateDicts(self._graftc).record()

    def set_extra_state(self, state: Any) -> None:
        """Do nothing, since the state was read before the first tensor was loaded."""

    @property
    def report(self) -> Report:
        """The cost of each adaptation: sites, parameters, bytes and FLOPs per token."""
        return cast(Report, self._graftc.report)

    def __repr__(self) -> str:
        """Return the source's modules as text, each with its adaptations.

        For each adaptation, the text gives the shape of the weight, the method, its rank (or another measure of its
        size) and the number of trainable elements. Identical layers are shown once; the last line gives totals.
        """
        return printed(self._graftc.compilation, self, *self._graftc.get_nb_trainable_parameters())

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the adaptations, what each one trains, and the collapsed module tree."""
        snapshot = self._graftc.snapshot
        return summary(snapshot)._repr_html_() + model_tree(snapshot)._repr_html_()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a ``forward`` that TRL sets on the model is passed through `answering`."""
        super().__setattr__(name, answering(self._graftc, value) if name == "forward" else value)


def compiled_class(model: nn.Module, controls: Iterable[str] = ()) -> type[Compiled]:
    """Return a subclass of `Compiled` whose ``forward`` has the source model's signature plus bank inputs.

    Trainers inspect this signature.

    Args:
        model: the source model.
        controls: the names of the bank inputs.
    """
    signature = inspect.signature(type(model).forward)
    kind = inspect.Parameter.KEYWORD_ONLY
    known = list(signature.parameters.values())
    rest = [p for p in known if p.kind is inspect.Parameter.VAR_KEYWORD]
    extra = [inspect.Parameter(name, kind, default=None) for name in controls]
    signature = signature.replace(parameters=[*(p for p in known if p not in rest), *extra, *rest])

    def forward(self: Compiled, *args: Any, **kwargs: Any) -> Any:
        return self._graftc.call(args, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    forward.__doc__ = type(model).forward.__doc__
    # Trainers look for "QuestionAnswering" and similar words in class names.
    return type(f"Compiled{type(model).__name__}", (Compiled,), {"forward": forward, "__module__": __name__})


refuse_wrapping()


@exclusive()
def make_compiled(compilation: Compilation) -> Compiled:
    """Return a module for a Compilation, with its first signature lowered in both modes."""
    given = [n for n, c in compilation.controls.items() if not isinstance(c, Parallel)]
    runner = CompiledRunner(compilation, make_compiled)
    compiled = compiled_class(compilation.model, given)(runner)
    for key in (compilation.key("train"), compilation.key("eval")):
        runner.install(key, runner.as_run(key))
    watch_training(runner)
    if compilation.spec.checkpoint == "layers":
        runner.activation_checkpointing_enable()
    return compiled
