"""The base of a compiled model as a module of its own, over the same tensors: the reference of DPO and the like."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self, TypeVar

from torch import Tensor, nn

from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.libraries import COPIED
from graftc.runtime.offered.ecosystem import Ecosystem
from graftc.runtime.offered.state import StateDicts
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError

T = TypeVar("T")

SAME = frozenset({*COPIED, "config", "device", "dtype", "main_input_name"})
"""Attributes of a compiled model that its reference has as well."""


class ReferenceModel(nn.Module):
    """A module that computes what the base of a compiled model computes, in eval mode, without a tensor of its own.

    A call runs the base's graph over the tensors of the compiled model, wherever these are by then: moved, or sharded.
    It has no parameters, so that no optimiser, wrapper or copy takes them for another model's.

    Args:
        runner: of the compiled model.
        entry: ``"hidden"`` ends at the last hidden state, as `base_model` does.
    """

    def __init__(self, runner: AdaptedRunner, entry: Literal["forward", "hidden"] = "forward") -> None:
        super().__init__()
        self._runner, self._entry = runner, entry
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own outputs, as its class would give them.

        Raises:
            GraftError: GC031 for inputs that cannot be captured.
        """
        runner = self._runner.of_base()
        return runner.within(lambda: (runner.call if self._entry == "forward" else runner.hidden)(args, kwargs))

    @property
    def base_model(self) -> ReferenceModel:
        """The base without its head: called, it gives ``last_hidden_state``."""
        return ReferenceModel(self._runner, "hidden")

    def train(self, mode: bool = True) -> Self:
        """Nothing to do: a reference is in eval mode, whatever mode the compiled model is in."""
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        """See `Ecosystem.get_input_embeddings`."""
        return Ecosystem(self._runner).get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """Where the base's own weights of the head over the vocabulary are; None where there is none."""
        return Ecosystem(self._runner.of_base()).get_output_embeddings()

    def get_extra_state(self) -> Tensor:
        """See `torch.nn.Module.get_extra_state`: what the base is, as ``uint8[bytes]``, by which its results are kept
        apart from those of another."""
        return StateDicts(self._runner).record()

    def set_extra_state(self, state: Any) -> None:
        """Nothing to do: there is nothing to load."""

    def __getattr__(self, name: str) -> Any:
        """What it has in common with the compiled model."""
        return getattr(self._runner, name) if name in SAME else super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceModel:
        """One of the same compiled model: no copy of the base is made."""
        return ReferenceModel(self._runner, self._entry)

    def extra_repr(self) -> str:
        """See `torch.nn.Module.extra_repr`."""
        return f"of {type(self._runner.module).__name__}"


class _Loaded:
    """Stands for the class that TRL loads a reference by.

    Args:
        reference: what it gives for every path.
    """

    def __init__(self, reference: ReferenceModel) -> None:
        self._reference = reference

    def from_pretrained(self, path: str, **settings: Any) -> ReferenceModel:
        """The reference."""
        return self._reference


class Referring:
    """Runs the base beside a compiled model.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    def reference(self) -> ReferenceModel:
        """A module that computes what the base computes, in eval mode, over the tensors of this model: the reference of
        DPO and KTO, ``DPOTrainer(compiled, ref_model=compiled.reference(), ...)``. No second model is in memory, and it
        follows this one to another device.

        It has the config, ``base_model`` and ``get_output_embeddings()`` of the base, and no parameters.
        """
        return ReferenceModel(self.runner)

    @public("compiled.trainer")
    def trainer(self, kind: Callable[..., T], *, args: Any = None, **arguments: Any) -> T:
        """A trainer of TRL over this model, with `reference` where it would load the base a second time, of which a
        base in memory has no file: ``compiled.trainer(GRPOTrainer, args=GRPOConfig(beta=0.04), reward_funcs=...)``.

        Args:
            kind: the trainer's class: ``DPOTrainer``, ``KTOTrainer``, ``GRPOTrainer``, ``RLOOTrainer`` and their like.
                One that has no reference is made as it would be anyhow.
            args: its config. It is as before afterwards.
            arguments: its other arguments, by name.

        Raises:
            GraftError: GC072 for a ``peft_config``; GC073 for what is not a class of a trainer, and for a ``model``,
                which is this one.
        """
        if not callable(kind):
            raise GraftError(
                "GC073", f"kind is {kind_of(kind)}", hint="give the class: compiled.trainer(DPOTrainer, args=...)"
            )
        if "model" in arguments:
            hint = f"leave model out: compiled.trainer({getattr(kind, '__name__', 'kind')}, args=...)"
            raise GraftError("GC073", "a trainer of a compiled model trains that model", hint=hint)
        if "ref_model" in inspect.signature(kind).parameters:
            arguments.setdefault("ref_model", self.reference())
            return kind(model=self.runner.module, args=args, **arguments)
        if not hasattr(args, "model_init_kwargs"):
            return kind(model=self.runner.module, args=args, **arguments)
        before = args.model_init_kwargs
        if "reward_funcs" in arguments:  # which TRL would load with the same settings
            arguments["reward_funcs"] = _loaded_rewards(arguments["reward_funcs"], before or {})
        args.model_init_kwargs = {**(before or {}), "architecture": _Loaded(self.reference())}
        try:
            return kind(model=self.runner.module, args=args, **arguments)
        finally:
            args.model_init_kwargs = before


def _loaded_rewards(given: Any, settings: Mapping[str, Any]) -> Any:
    """Reward models that are given by name, loaded as TRL loads them."""
    if isinstance(given, list):
        return [_loaded_rewards(each, settings) for each in given]
    if not isinstance(given, str):
        return given
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(given, num_labels=1, **settings)
