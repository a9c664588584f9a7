"""A compiled model's base as a module over the same tensors: the reference model for DPO and similar methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, Self, TypeVar

from torch import Tensor, nn

from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.libraries import COPIED
from graftc.runtime.offered.ecosystem import Ecosystem
from graftc.runtime.offered.state_dicts import StateDicts
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError

T = TypeVar("T")

SAME = frozenset({*COPIED, "config", "device", "dtype", "main_input_name"})
"""Attributes of a compiled model that its reference also has."""


class ReferenceModel(nn.Module):
    """A module that computes what a compiled model's base computes, in eval mode, without tensors of its own.

    A call runs the base's graph over the compiled model's tensors, even after these have been moved or sharded. The
    module has no parameters, so that no optimiser, wrapper or copy mistakes them for those of another model.

    Args:
        runner: the Runner of the compiled model.
        entry: the kind of output; ``"hidden"`` ends at the last hidden state, as `base_model` does.
    """

    def __init__(self, runner: AdaptedRunner, entry: Literal["forward", "hidden"] = "forward") -> None:
        super().__init__()
        self._runner, self._entry = runner, entry
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the base's outputs, in its own output class.

        Raises:
            GraftError: GC031 for inputs that cannot be captured.
        """
        runner = self._runner.of_base()
        return runner.within(lambda: (runner.call if self._entry == "forward" else runner.hidden)(args, kwargs))

    @property
    def base_model(self) -> ReferenceModel:
        """The base without its head; calling it returns ``last_hidden_state``."""
        return ReferenceModel(self._runner, "hidden")

    def train(self, mode: bool = True) -> Self:
        """Return the module unchanged: a reference is always in eval mode, whatever the compiled model's mode."""
        return self

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the module with the token embedding table; None if there is none."""
        return Ecosystem(self._runner).get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the module with the weights of the base's own vocabulary head; None if there is none."""
        return Ecosystem(self._runner.of_base()).get_output_embeddings()

    def get_extra_state(self) -> Tensor:
        """Return the compiled model's record as ``uint8[bytes]``; see `torch.nn.Module.get_extra_state`.

        The record distinguishes this base's results from those of another base.
        """
        return StateDicts(self._runner).record()

    def set_extra_state(self, state: Any) -> None:
        """Do nothing, since there is nothing to load."""

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that the reference shares with the compiled model."""
        return getattr(self._runner, name) if name in SAME else super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReferenceModel:
        """Return another reference to the same compiled model, without copying the base."""
        return ReferenceModel(self._runner, self._entry)

    def extra_repr(self) -> str:
        """Return the name of the compiled model's class, for the module's printed form."""
        return f"of {type(self._runner.module).__name__}"


class Referring(Feature):
    """Provides a compiled model's base as a reference model, including for TRL's trainers."""

    def reference(self) -> ReferenceModel:
        """Return a module that computes what the base computes, in eval mode, using this model's tensors.

        It serves as the reference model for DPO and KTO: ``DPOTrainer(compiled, ref_model=compiled.reference(), ...)``.
        No second model is in memory, and the module follows this model to another device.

        It has the base's config, ``base_model`` and ``get_output_embeddings()``, but no parameters.
        """
        return ReferenceModel(self.runner)

    @public("compiled.trainer")
    def trainer(self, kind: Callable[..., T], *, args: Any = None, **arguments: Any) -> T:
        """Return a TRL trainer for this model that uses `reference` instead of loading the base a second time.

        This also works for a base that exists only in memory and has no file to load:
        ``compiled.trainer(GRPOTrainer, args=GRPOConfig(beta=0.04), reward_funcs=...)``.

        Args:
            kind: the trainer's class: ``DPOTrainer``, ``KTOTrainer``, ``GRPOTrainer``, ``RLOOTrainer`` or a similar
                one. A trainer without a reference is created as usual.
            args: the trainer's config; it is unchanged afterwards.
            arguments: the trainer's other arguments, by name.

        Raises:
            GraftError: GC072 for a ``peft_config``; GC073 for a ``kind`` that is not a trainer class, and for a
                ``model``, since the model is always this one.
        """
        if not callable(kind):
            raise GraftError(
                "GC073", f"kind is {kind_of(kind)}", hint="pass the class: compiled.trainer(DPOTrainer, args=...)"
            )
        if "model" in arguments:
            hint = f"leave model out: compiled.trainer({getattr(kind, '__name__', 'kind')}, args=...)"
            raise GraftError("GC073", "a trainer for a compiled model always trains that model", hint=hint)
        if "ref_model" in inspect.signature(kind).parameters:
            arguments.setdefault("ref_model", self.reference())
            return kind(model=self.runner.module, args=args, **arguments)
        if not hasattr(args, "model_init_kwargs"):
            return kind(model=self.runner.module, args=args, **arguments)
        before = args.model_init_kwargs
        if "reward_funcs" in arguments:  # TRL would load them with the changed settings
            arguments["reward_funcs"] = _loaded_rewards(arguments["reward_funcs"], before or {})
        reference = self.reference()
        # TRL loads a reference with the class named in the settings, whatever the path.
        loader = SimpleNamespace(from_pretrained=lambda path, **settings: reference)
        args.model_init_kwargs = {**(before or {}), "architecture": loader}
        try:
            return kind(model=self.runner.module, args=args, **arguments)
        finally:
            args.model_init_kwargs = before


def _loaded_rewards(given: Any, settings: Mapping[str, Any]) -> Any:
    """Return the reward models, after loading those given by name as TRL would."""
    if isinstance(given, list):
        return [_loaded_rewards(each, settings) for each in given]
    if not isinstance(given, str):
        return given
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(given, num_labels=1, **settings)
