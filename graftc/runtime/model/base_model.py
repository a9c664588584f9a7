"""The base model within a compiled model, which runs up to the last hidden state.

It is called by training loops that compute the head and the loss themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from graftc.compat.modules import children_of
from graftc.passes.core.weights.containers import Container, Node, UnitCall
from graftc.passes.core.weights.store import Store


class HiddenStates(Node):
    """The state of a `BaseModel`: the function that it runs.

    Attributes:
        call: a function that takes positional and keyword arguments and returns the last hidden state in the model's
            output class.
    """

    call: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None


class BaseModel(Container):
    """The child module that contains a model's layers without the head: ``compiled.model`` in most decoders."""

    _graftc: HiddenStates

    def __init__(self) -> None:
        super().__init__()
        self._graftc = HiddenStates()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the model up to its last hidden state and return an output that has ``last_hidden_state``.

        Raises:
            GraftError: GC031 for inputs that cannot be captured; GC043 if the model returns no hidden states.
        """
        call = self._graftc.call
        if call is None or (inputs and isinstance(inputs[0], UnitCall)):
            return super().forward(*inputs, **options)
        return call(inputs, options)


def install_base_model(
    store: Store, model: nn.Module, call: Callable[[tuple[Any, ...], dict[str, Any]], Any]
) -> BaseModel | None:
    """Make the base model within a compiled model callable.

    Args:
        store: the Store whose tree contains the compiled model's containers.
        model: the source model, which names its base model (``base_model_prefix``).
        call: a function that runs the base model, given the positional and keyword arguments of a call.

    Returns:
        The base model; None if the model has none, is a base model itself, or returns no hidden states.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str) or not isinstance(children_of(model).get(prefix), nn.Module):
        return None
    if not hasattr(getattr(model, "config", None), "output_hidden_states"):
        return None
    base = store.replace_container(prefix, BaseModel)
    base._graftc.call = call
    return base
