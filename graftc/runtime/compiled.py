"""`Compiled`: the adapted model as an `nn.Module` that behaves like the model that it was made from.

Its features are implemented by plain objects that are given its Runner, each in a file of its own; `offered` lists
them.
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
from graftc.runtime.offered.state import StateDicts
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
    """The adapted model: same inputs, same outputs, loss from ``labels``; only what the spec says trains.

    Instances are created by `graftc.compile`; ``Compiled[M]`` is the type for a source of class ``M``. A call returns
    what ``M.forward`` returns, in its own output class; as for every `torch.nn.Module`, a type checker sees `Any`
    there. ``train()`` and ``eval()`` switch between two graphs over one set of tensors. An input that was absent so far
    is captured at its first use.

    The names below are graftc's, whatever the names of the source model's children are. Everything else that graftc
    offers gives way to a child, a parameter or a buffer of the same name, and is an attribute of `runner_of(compiled)`
    as well.
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

        The base's own weights are not in it. `graftc.load` reads it. For a sharded model every process has to call this
        method, and the first one writes.

        Args:
            path: the folder to create; it is complete when it appears.
            force: whether to replace an existing artifact, in one step.
            base: the location of the base, in the form that the command line takes; by default what transformers has
                recorded for the model.
            certify: whether to fold what folds, and include the certificate.
            full: whether to identify the base by all its values instead of a sample of each tensor.

        Raises:
            GraftError: GC063 if something else is there, GC064 if the artifact cannot be written.
        """
        return cast(Path, self._graftc.save(path, force=force, base=base, certify=certify, full=full))

    def disabled(self, *names: str) -> AbstractContextManager[None]:
        """Run the block without the named adaptations, or with the base alone if none is named.

        With ``parallel`` the base's rows are returned once for each adaptation, as many as a call returns outside the
        block.

        Leaving out some adaptations takes as long as compiling without a capture at its first use, and next to nothing
        after that.

        Args:
            names: adaptations or compositions to leave out; ``trained`` is the ``train:`` list. By default all of them.

        Raises:
            GraftError: GC091 if there is no such adaptation, GC036 for a part of a composition.
        """
        return cast("AbstractContextManager[None]", self._graftc.disabled(*names))

    def reference(self) -> ReferenceModel:
        """Return a module that computes what the base computes, in eval mode, over the tensors of this model.

        It is the reference model of DPO and KTO: ``DPOTrainer(compiled, ref_model=compiled.reference(), ...)``. No
        second model is in memory, and the module follows this model to another device.

        It has the config, ``base_model`` and ``get_output_embeddings()`` of the base, and no parameters.
        """
        return cast("ReferenceModel", self._graftc.reference())

    def activate(self, choice: str | int, bank: str | None = None) -> None:
        """Choose the adaptation for calls that do not choose one themselves.

        No graph changes, so the choice may differ from call to call.

        Args:
            choice: an adaptation's name, or the number of its slot.
            bank: the bank's name; needed only if there are several.

        Raises:
            GraftError: GC038 if there is no such slot, GC091 if there is no such bank.
        """
        self._graftc.activate(choice, bank)

    def train_only(self, *names: str) -> None:
        """Train only these adaptations from now on, or all of them if none is named.

        The tensors of the others no longer require gradients, so that no optimiser changes them, not even by weight
        decay.

        Args:
            names: adaptations or compositions.

        Raises:
            GraftError: GC091 if there is no such adaptation.
        """
        self._graftc.train_only(*names)

    def explain(self, name: str, mode: Mode = "eval") -> Explanation:
        """Explain why a printed value, node, place or tensor is in the adapted graph; print the result to read it.

        Raises:
            GraftError: GC091 if nothing has this name, or several things have.
        """
        return cast("Explanation", self._graftc.explain(name, mode))

    def merged_state_dict(self, *, digests: bool = False) -> MergedTensors:
        """Return the tensors of the merged model one by one, for trainers that push weights to an inference engine.

        Each tensor is folded when it is requested, always from the base's own values, so that repeated merging does not
        accumulate rounding: the same adapters give the same bits, and the base is never written to. At any time only
        one tensor exists, or those that are folded together. Names are those of the source model's state dict,
        including tied ones. A tensor that folding does not change is the base's own: copy it before writing to it.
        Packed weights are returned by their values, in full precision. No graph is made, and nothing is certified or
        saved.

        Args:
            digests: whether to compute the SHA-256 of each tensor as well; it is then in ``digests`` of the returned
                object, for the receiver to compare.

        Returns:
            An iterator of ``(name, tensor)``, in the base's element types and on the device of the model.

        Raises:
            GraftError: GC050 naming what cannot fold, GC022 for tied weights, GC051 if an adapter has values that are
                not finite; during iteration GC051 for such a tensor, GC052 for a bias that the class has no place for.
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
            names: the only adaptations to fold, besides the ``train:`` list and added tokens; the others are left out,
                and nothing of them is in the result. `merge_partially` with ``only`` keeps them beside the new base.
            budget: the largest allowed absolute difference of outputs; by default the spec's, or a bound by dtype.
            progress: function that is called with the fraction of the folding that is done, from 0 to 1, tensor by
                tensor.
            dtype: ``torch.float32`` first widens a base in 16 bits, so that rounding takes nothing of the update: the
                merged model, its folder and its certificate are in float32. By default the base's own.
            base: the form of a quantised base's packed weights in the result. ``"full"``: all are in full precision, in
                the element type of the model, and the merged model is a plain one of the source's class.
                ``"requantized"``: those that change are packed again as before, others keep their codes; the
                certificate has the measured error (`Certificate.requantised`), and ``budget`` is by default half of the
                largest output, 5 % with `int8`. There is no default: the fold is exact only in full precision.
            allow_unchanged: if true, a merge that changes no tensor of the base is not an error.

        Raises:
            GraftError: GC050 naming what cannot fold, GC022 for tied weights, GC051 over budget, GC104 if no tensor
                changes, GC073 for a budget that is not a number and a dtype that is not wider; for ``names``, GC091 for
                an unknown one and GC036 for a part of a composition; GC165 for a quantised base if ``base`` is missing,
                GC166 if weights cannot be packed again.
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
        """Fold what folds, certify that, and compile the rest on a base that has the folded weights.

        An adaptation that was trained with randomly drawn experts becomes the simpler adaptation with their mean,
        whether anything folds or not.

        Args:
            budget, base, allow_unchanged: as for `merge`.
            only: names of the adaptations to fold, ``trained`` for the ``train:`` list; the rest stays beside the new
                base, whether it would fold or not. By default all that fold.

        Raises:
            GraftError: GC051 over budget, GC052 if the class has no place for a folded tensor, GC104 if what folds
                changes no tensor; for ``only``, GC050 and GC022 for what does not fold and GC091 for an unknown name.
        """
        partial = self._graftc.merge_partially(budget, only=only, base=base, allow_unchanged=allow_unchanged)
        return cast("Partial[M, Compiled[M]]", partial)

    def get_extra_state(self) -> Tensor:
        """Return what the tensors of a state dict belong to, as ``uint8[bytes]``.

        See `torch.nn.Module.get_extra_state`.
        """
        return StateDicts(self._graftc).record()

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: the state has been read before the first tensor was loaded."""

    @property
    def report(self) -> Report:
        """The additions of every adaptation: sites, parameters, bytes, FLOPs per token."""
        return cast(Report, self._graftc.report)

    def __repr__(self) -> str:
        """Return the source's modules as text, each with the adaptations that it has.

        For an adaptation it contains the shape of the weight, the method, its rank (or another measure of its size) and
        the number of trainable elements. Equal layers are shown once; the last line has totals.
        """
        return printed(self._graftc.compilation, self, *self._graftc.get_nb_trainable_parameters())

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: the adaptations and what they train, and the collapsed tree of modules."""
        snapshot = self._graftc.snapshot
        return summary(snapshot)._repr_html_() + model_tree(snapshot)._repr_html_()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a ``forward`` that TRL sets on the model is passed through `answering`."""
        super().__setattr__(name, answering(self._graftc, value) if name == "forward" else value)


def compiled_class(model: nn.Module, controls: Iterable[str] = ()) -> type[Compiled]:
    """Return a subclass of `Compiled` whose ``forward`` has the source model's signature, and inputs of banks as well.

    Trainers look at this signature.
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
    # Trainers look for "QuestionAnswering" and similar words in the name of a class.
    return type(f"Compiled{type(model).__name__}", (Compiled,), {"forward": forward, "__module__": __name__})


refuse_wrapping()


@exclusive()
def make_compiled(compilation: Compilation) -> Compiled:
    """Return the module for a Compilation, with its first signature lowered in both modes."""
    given = [n for n, c in compilation.controls.items() if not isinstance(c, Parallel)]
    runner = CompiledRunner(compilation, make_compiled)
    compiled = compiled_class(compilation.model, given)(runner)
    for key in (compilation.key("train"), compilation.key("eval")):
        runner.install(key, runner.as_run(key))
    watch_training(runner)
    if compilation.spec.checkpoint == "layers":
        runner.activation_checkpointing_enable()
    return compiled
