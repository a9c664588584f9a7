"""Compute initial values from examples, and create the model that starts from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from graftc.compiler.steering import live_places
from graftc.passes.core.method.capabilities import Initialised, Transition
from graftc.passes.core.method.principal import PrincipalComponents
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.method.scoring import GradientSum
from graftc.passes.core.method.steering import AdaptedSite
from graftc.passes.core.sites.sites import LinearSite
from graftc.runtime.model.evaluation import in_eval_mode
from graftc.runtime.model.sharded import in_every_process
from graftc.runtime.training.selecting import Loss, Selecting, batches_for
from graftc.runtime.training.steering import TrainingSteering
from graftc.specs.errors.diagnostics import GraftError

_PRODUCTS = (torch.ops.aten.linear.default, functional.linear)
_CASTS = (torch.ops.aten.to.dtype, Tensor.to)
_IGNORED = -100
"""The label of tokens that the loss leaves out."""


class Initialising(Selecting):
    """Creates the model whose adaptations start from examples."""

    @in_every_process
    def initialise(self, examples: Iterable[Mapping[str, Any]], *, loss: Loss | None = None) -> Any:
        """Return a model whose adaptations start from examples, as LoRA does with ``eva`` and ``lora_ga``.

        This model stays unchanged. The examples pass through it in eval mode, without dropout. Inputs of padding and of
        tokens with the label -100 are left out. Gradients are those of whole weights; each needs as much memory as its
        weight in float32.

        Args:
            examples: batches of inputs by name, with labels if gradients are needed.
            loss: a function that takes the outputs and the batch and returns a scalar; by default the model's loss.

        Raises:
            GraftError: GC056 if no adaptation starts from examples, one has been trained, there are no examples with
                tokens that count, they yield no loss or no gradient, or values that are not finite.
        """
        pending = self._pending(
            TrainingSteering(self.runner).uninitialised,
            "no adaptation has initial values that are yet to be computed",
            hint="use init: eva or init: lora_ga, and compile the spec again to initialise again",
            on_meta="initial values cannot be computed on the meta device",
        )
        examples = batches_for(pending, examples, "initialise")
        transitions: dict[str, Transition[Any]] = {}
        for resolved in pending:
            method = method_for(resolved.spec.method)
            assert isinstance(method, Initialised)
            places, _ = live_places(self.runner.compilation, resolved)
            if method.starts_from(resolved.spec, places) == "gradients":
                statistics: Sequence[Any] = self._gradients(places, examples, loss)
            else:
                statistics = self._components(method, places, examples)
            with torch.no_grad():
                transitions[resolved.name] = method.initialised(resolved.spec, places, statistics)
        return self._after(transitions)

    def _gradients(
        self, places: Sequence[AdaptedSite[Any]], examples: Iterable[Mapping[str, Any]], loss: Loss | None
    ) -> list[Tensor]:
        """Return the sum of the gradients of each place's weight, ``[..., out, in]``."""
        sites = [place.site for place in places if isinstance(place.site, LinearSite)]
        names = dict.fromkeys(site.own.tensor for site in sites)
        sums = self._scores(names, GradientSum(), examples, loss, "initialise")
        gradients = [site.own.operand(sums[site.own.tensor]) for site in sites]
        for site, gradient in zip(sites, gradients, strict=True):
            _require_finite(gradient, f"the gradient of {site.key}")
            if not bool(gradient.any()):
                hint = "pass batches with labels that the loss depends on"
                raise GraftError("GC056", f"the gradient of {site.key} is zero for all examples", hint=hint)
        return gradients

    def _components(
        self, method: Initialised[Any], places: Sequence[AdaptedSite[Any]], examples: Iterable[Mapping[str, Any]]
    ) -> list[PrincipalComponents]:
        """Return the principal components of each place's inputs; places that read the same input share them."""
        inputs = _Inputs({id(place.tensors[method.input_part]): index for index, place in enumerate(places)})
        components: dict[int, PrincipalComponents] = {}
        sources: dict[int, int] = {}
        with in_eval_mode(self.runner.module), torch.no_grad():
            for example in examples:
                inputs.clear()
                with inputs:
                    self.runner.module(**example)
                first: dict[int, int] = {}
                for index, value in inputs.seen.items():
                    sources.setdefault(index, first.setdefault(id(value), index))
                real = _real_tokens(example)
                for source in dict.fromkeys(sources.values()):
                    if source not in components:
                        sharing = [places[index] for index, own in sources.items() if own == source]
                        components[source] = PrincipalComponents(max(map(method.components, sharing)))
                    rows = _rows(inputs.seen[source], real)
                    _require_finite(rows, f"an input of {places[source].site.key}")
                    components[source].add(rows)
        if not components or not all(own.seen for own in components.values()):
            message = "the examples have no tokens that count" if components else "there are no examples to start from"
            hint = "pass batches whose attention mask and labels leave some tokens in"
            raise GraftError("GC056", message, hint=hint)
        return [components[sources[index]] for index in range(len(places))]


class _Inputs(TorchFunctionMode):
    """A mode that keeps the inputs that certain parameters are multiplied with, by the parameters' numbers.

    On a 16-bit base a graph casts the parameters first.
    """

    def __init__(self, numbers: Mapping[int, int]) -> None:
        super().__init__()
        self._numbers = numbers
        self._casts: dict[int, tuple[int, Tensor]] = {}
        self.seen: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.seen.clear()
        self._casts.clear()

    def __torch_function__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator in _PRODUCTS and len(args) > 1:
            cast = self._casts.get(id(args[1]))
            number = self._numbers.get(id(args[1]), None if cast is None else cast[0])
            if number is not None:
                self.seen[number] = args[0]
        elif operator in _CASTS and id(args[0]) in self._numbers:
            self._casts[id(result)] = self._numbers[id(args[0])], result  # kept alive, so that its id is its own
        return result


def _require_finite(values: Tensor, what: str) -> None:
    """Raise GC056 if not all values are finite."""
    if not bool(values.isfinite().all()):
        hint = "check the model's outputs for these examples"
        raise GraftError("GC056", f"{what} is not finite for these examples", hint=hint)


def _real_tokens(example: Mapping[str, Any]) -> Tensor | None:
    """Return which tokens count, ``bool[batch, tokens]``; None if the example does not say."""
    mask, labels = example.get("attention_mask"), example.get("labels")
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if isinstance(labels, Tensor) and labels.dim() == 2:
        labelled = labels != _IGNORED
        real = labelled if real is None or real.shape != labelled.shape else real & labelled
    return real


def _rows(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the values of the tokens that count, ``[n, width]``."""
    if real is not None and values.shape[:-1] == real.shape:
        return values[real.to(values.device)]
    return values.reshape(-1, values.shape[-1])
