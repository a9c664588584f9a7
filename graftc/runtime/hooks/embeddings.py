"""A compiled model's token embedding table, whose hooks receive and may change the values that graphs look up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils.hooks import RemovableHandle

from graftc.passes.core.ir.program import Program
from graftc.passes.core.weights.containers import Container, Node
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError


class _LookedUp(threading.local):
    """The values looked up by graphs in the current thread, innermost call last."""

    def __init__(self) -> None:
        self.values: list[Any] = []


_looked_up = _LookedUp()


class Hooks(Node):
    """The state of an `Embeddings` module.

    Attributes:
        changed: a function, called when a hook is registered, that makes graphs call the module.
    """

    changed: Callable[[], None] | None = None

    def enter(self, module: nn.Module, *inputs: Any) -> Any:
        """Call the module with the token ids, as the source model does."""
        value, ids = inputs
        _looked_up.values.append(value)
        try:
            return module(ids)
        finally:
            _looked_up.values.pop()


class Embeddings(Container):
    """The module that `get_input_embeddings` returns. Training loops hook it to add noise to embeddings (NEFTune)."""

    _graftc: Hooks

    def __init__(self) -> None:
        super().__init__()
        self._graftc = Hooks()

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """Register a forward hook, as `torch.nn.Module.register_forward_hook` does.

        The output is the value that the graph looks up, ``[batch, sequence, hidden]``, including adaptations of the
        table; the input is the token ids, ``[batch, sequence]``.

        Raises:
            GraftError: GC043 if the output is not a single value of the graph.
        """
        if self._graftc.changed is not None:
            self._graftc.changed()
        return nn.Module.register_forward_hook(self, hook, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return the value that a graph has looked up.

        Raises:
            GraftError: GC043 if user code calls the module directly.
        """
        if options or len(inputs) != 1 or not _looked_up.values:
            return super().forward(*inputs, **options)
        return _looked_up.values[-1]


def path_by_getter(model: nn.Module, getter: str) -> str | None:
    """Return the path of the module that a method of a model returns; None if there is no such method or module.

    Args:
        model: the model.
        getter: the method's name, as in transformers, such as ``get_input_embeddings``.
    """
    try:
        target = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return next((path for path, module in model.named_modules() if module is target), None)


def install_embeddings(store: Store, model: nn.Module, changed: Callable[[], None]) -> str | None:
    """Make a compiled model's token embedding table accept hooks.

    Args:
        store: the Store whose tree contains the compiled model's containers.
        model: the source model, which determines the table's path.
        changed: the function to call when a hook is registered; see `Hooks`.

    Returns:
        The path of the table; None if the model has no table or is itself one.
    """
    path = path_by_getter(model, "get_input_embeddings")
    if not path:
        return None
    store.replace_container(path, Embeddings)._graftc.changed = changed
    return path


def call_hooks(program: Program, root: fx.Graph, path: str) -> None:
    """Insert a call to the embedding table's module, passing the value that the code looks up.

    Args:
        program: the Program in which to find the value.
        root: the part of its code outside layers; modified.
        path: the path of the module.

    Raises:
        GraftError: GC043 if the module's output is not a single value of the graph.
    """
    inside = {n for n in program.graph.nodes if n.op == "call_function" and n.meta.get("module", "") == path}
    exits = {n.name for n in inside if any(user not in inside for user in n.users)}
    if not exits:  # the model is called with embeddings
        return
    outputs = [node for node in root.nodes if node.name in exits]
    indices = {n.args[1].name for n in inside if n.target is torch.ops.aten.embedding.default}
    given = (n for n in root.nodes if n.op == "placeholder" and str(n.target).endswith("input_ids"))
    ids = [node for node in root.nodes if node.name in indices] or list(given)
    if len(exits) > 1 or not outputs or not ids:
        message = f"a hook on {path} would never be called: the module's output is not a single value of the graph"
        raise GraftError("GC043", message, hint="put it on the compiled model, on a whole layer or on the source model")
    (node,) = outputs
    with root.inserting_after(node):
        called = root.call_module(path, (node, ids[0]))
    node.replace_all_uses_with(called, delete_user_cb=lambda user: user is not called)
