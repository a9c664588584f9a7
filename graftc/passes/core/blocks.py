"""Modules that run graphs over the Store's tree: a Block for every repeated layer, and the root above them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from graftc.passes.core.codegen import Function, function_of
from graftc.passes.core.program import Program
from graftc.passes.core.store import Container, Store
from graftc.passes.outline import outline


class Block(Container):
    """One repeated layer: owns its tensors and runs its part of every Program.

    Attributes:
        checkpointing: recompute activations in the backward pass instead of keeping them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpointing = False
        self._functions: dict[str, Function] = {}

    def install(self, key: str, function: Function) -> None:
        """Keep the code of this layer's part of one Program."""
        self._functions[key] = function

    def forward(self, key: str, *inputs: Any) -> Any:
        """Run the part called ``key``."""
        function = self._functions[key]
        if self.checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(function, self, *inputs, use_reentrant=False)
        return function(self, *inputs)


class Runner(nn.Module):
    """A module over a Store's tree that runs Programs, with a Block per repeated layer.

    Args:
        store: its tree becomes this module's.
    """

    def __init__(self, store: Store) -> None:
        super().__init__()
        store.rehome(self)
        self._store = store
        self._roots: dict[str, Function] = {}
        self._programs: dict[str, Program] = {}
        self.register_state_dict_post_hook(_tied_once)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_tied_again)  # type: ignore[no-untyped-call]

    @property
    def blocks(self) -> dict[str, Block]:
        """Blocks by module path."""
        return {name: module for name, module in self.named_modules() if isinstance(module, Block)}

    def install(self, key: str, program: Program) -> None:
        """Lower a Program to code; `run` runs it under ``key``."""
        self._programs[key] = program
        self._lower(key)

    def _lower(self, key: str) -> None:
        program = self._programs[key]
        outlined = outline(program)
        device = self._store_device()
        for block in outlined.blocks:
            owner = self._store.container(block.path)
            if not isinstance(owner, Block):
                made = Block()
                made.training = self.training
                self._store.replace_container(block.path, made)
                owner = made
            owner.install(f"{key}#{block.use}", function_of(block.graph, device))
        for node in outlined.root.find_nodes(op="call_module"):
            use, *inputs = node.args
            node.args = (f"{key}#{use}", *inputs)
        self._roots[key] = function_of(outlined.root, device)

    def _store_device(self) -> torch.device:
        return next((t.device for _, t in self._store.base()), torch.device("cpu"))

    def run(self, key: str, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Flat outputs of the Program installed as ``key``."""
        program_inputs = [inputs[name] for name in self._programs[key].signature]
        outputs: tuple[Any, ...] = self._roots[key](self, *program_inputs)
        return outputs

    def relower(self) -> None:
        """Make all code anew, for tensors that have moved to another device."""
        for key in self._programs:
            self._lower(key)


def _tied_once(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state dict has tied tensors once, by the name that owns them, as file formats want it."""
    assert isinstance(module, Runner)
    for alias in module._store.aliases:
        state.pop(prefix + alias, None)


def _tied_again(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Loading finds tied tensors under each of their names."""
    assert isinstance(module, Runner)
    for alias, owner in module._store.aliases.items():
        if prefix + owner in state:
            state.setdefault(prefix + alias, state[prefix + owner])
