"""The base model within a compiled one, callable as far as the last hidden state.

Training loops that compute the head and the loss themselves call it.
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
        call: a function of positional and keyword arguments that returns the last hidden state in the model's output
            class.
    """

    call: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None


class BaseModel(Container):
    """The child of a model that contains its layers, without the head: ``compiled.model`` in most decoders."""

    _graftc: HiddenStates

    def __init__(self) -> None:
        super().__init__()
        self._graftc = HiddenStates()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the model up to its last hidden state and return an output with ``last_hidden_state``.

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
    """Make the base model within a compiled one callable.

    Args:
        store: the Store whose tree has the containers of the compiled model.
        model: the source model, which names its base model (``base_model_prefix``).
        call: a function that runs a call of it, given the positional and keyword arguments.

    Returns:
        The base model; None if the model has none, is one itself, or returns no hidden states.
    """
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str) or not isinstance(children_of(model).get(prefix), nn.Module):
        return None
    if not hasattr(getattr(model, "config", None), "output_hidden_states"):
        return None
    base = store.replace_container(prefix, BaseModel)
    base._graftc.call = call
    return base
