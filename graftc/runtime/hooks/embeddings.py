"""The table of token embeddings within a compiled model: hooks on it see, and may change, what the graphs look up."""

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
    """What graphs of this thread have looked up, the innermost call last."""

    def __init__(self) -> None:
        self.values: list[Any] = []


_looked_up = _LookedUp()


class Hooks(Node):
    """What an `Embeddings` tells of.

    Attributes:
        changed: called when it has its first hook; makes graphs call the module.
    """

    changed: Callable[[], None] | None = None

    def enter(self, module: nn.Module, *inputs: Any) -> Any:
        """See `Node`: the module is called with the ids, as in the source model."""
        value, ids = inputs
        _looked_up.values.append(value)
        try:
            return module(ids)
        finally:
            _looked_up.values.pop()


class Embeddings(Container):
    """The module that `get_input_embeddings` gives. Training loops hook it to add noise to embeddings (NEFTune)."""

    _graftc: Hooks

    def __init__(self) -> None:
        super().__init__()
        self._graftc = Hooks()

    def register_forward_hook(self, hook: Any, **options: Any) -> RemovableHandle:
        """See `torch.nn.Module.register_forward_hook`. The output is what the graph looks up, adaptations of the table
        included, ``[batch, sequence, hidden]``; the input is the ids, ``[batch, sequence]``.

        Raises:
            GraftError: GC043 where the graph has no one value that is the output.
        """
        if self._graftc.changed is not None:
            self._graftc.changed()
        return nn.Module.register_forward_hook(self, hook, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Pass on what a graph has looked up.

        Raises:
            GraftError: GC043 for a call as of the source's module.
        """
        if options or len(inputs) != 1 or not _looked_up.values:
            return super().forward(*inputs, **options)
        return _looked_up.values[-1]


def install_embeddings(store: Store, model: nn.Module, changed: Callable[[], None]) -> str | None:
    """Let the table of token embeddings of a compiled model have hooks.

    Args:
        store: its tree has the containers of the compiled model.
        model: the source model, which says where its table is.
        changed: see `Hooks`.

    Returns:
        Its path; None where the model has none, or is one.
    """
    try:
        found: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    path: str = next((path for path, module in model.named_modules() if module is found), "")
    if not path:
        return None
    store.replace_container(path, Embeddings)._graftc.changed = changed
    return path


def call_hooks(program: Program, root: fx.Graph, path: str) -> None:
    """Let code call a module with what it looks up.

    Args:
        program: where the value is found.
        root: the part of its code that is not in layers; changed.
        path: of the module.

    Raises:
        GraftError: GC043 where there is no one such value.
    """
    calls = program.graph.nodes
    inside = {n for n in calls if n.op == "call_function" and n.meta.get("module", "") == path}
    exits = {n.name for n in inside if any(user not in inside for user in n.users)}
    if not exits:  # embeddings were given
        return
    found = [node for node in root.nodes if node.name in exits]
    indices = {n.args[1].name for n in inside if n.target is torch.ops.aten.embedding.default}
    given = (n for n in root.nodes if n.op == "placeholder" and str(n.target).endswith("input_ids"))
    ids = [node for node in root.nodes if node.name in indices] or list(given)
    if len(exits) > 1 or not found or not ids:
        message = f"a hook on {path} would never be called: its output is not one value of the graph"
        raise GraftError("GC043", message, hint="put it on the compiled model, on a whole layer or on the source model")
    (node,) = found
    with root.inserting_after(node):
        called = root.call_module(path, (node, ids[0]))
    node.replace_all_uses_with(called, delete_user_cb=lambda user: user is not called)
