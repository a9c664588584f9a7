"""Record what autograd keeps for a graph, by running the graph once on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from graftc.compat.fake_tensors import FakeTensorMode
from graftc.compat.modes import TorchDispatchMode
from graftc.compat.operators import CPU_FLASH_ATTENTION, OTHER_FUSED_ATTENTION
from graftc.compat.pytree import tree_flatten, tree_map_only
from graftc.compat.tensors import storage_key
from graftc.passes.core.ir.codegen import tensor_at
from graftc.passes.core.packing.gradients import pass_on

aten = torch.ops.aten
_ATTENTIONS = (
    CPU_FLASH_ATTENTION,
    OTHER_FUSED_ATTENTION,
)
"""Fused attention operators whose floating-point operations torch does not count."""

Layer = Callable[..., Any]
"""A function that runs a layer on fake tensors: ``layer(module, *inputs)``."""


@dataclass
class Recorded:
    """The observations from one run.

    Attributes:
        storages: the number of the storage of every node whose value is a single tensor.
        sizes: the sizes of the storages in bytes.
        saved: the storages that autograd keeps, except those of parameters and buffers.
        own: the storages of parameters and buffers, which exist anyway.
        several: the nodes whose values consist of several tensors.
        flops: the floating-point operations of products and attention operators, by node.
        outputs: the storages that the graph returns.
        results: the values that the graph returns, with fake tensors.
    """

    storages: dict[fx.Node, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    saved: frozenset[int] = frozenset()
    own: frozenset[int] = frozenset()
    several: set[fx.Node] = field(default_factory=set)
    flops: dict[fx.Node, int] = field(default_factory=dict)
    outputs: frozenset[int] = frozenset()
    results: Any = None

    @property
    def saved_bytes(self) -> int:
        """The bytes that autograd keeps."""
        return sum(self.sizes[storage] for storage in self.saved)

    def owners(self) -> dict[int, fx.Node]:
        """Return the first node for each storage, which is the node that created it."""
        owners: dict[int, fx.Node] = {}
        for node, storage in self.storages.items():
            owners.setdefault(storage, node)
        return owners


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating-point operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet in _ATTENTIONS:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))  # type: ignore[no-untyped-call]
        return result


class _Kept:
    """The object that autograd keeps instead of a saved tensor."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """Return a value with its tensors replaced by new tensors without memory.

    The new tensors are leaves that require gradients if the originals do. A tensor on the meta device, whose eventual
    device is unknown, is replaced by one on the CPU, whose operators show most of what autograd keeps for them.
    """

    def replacement(tensor: Tensor) -> Tensor:
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with mode:
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            return new.requires_grad_() if tensor.requires_grad else new

    return tree_map_only(Tensor, replacement, value)


def record(
    graph: fx.Graph, module: nn.Module, inputs: Sequence[Any], layers: Mapping[str, Layer], mode: FakeTensorMode
) -> Recorded:
    """Run a graph on fake tensors in grad mode, and return the observations.

    Args:
        graph: a graph that names tensors and layers relative to ``module``.
        module: the module that contains them; the values of its tensors are not read.
        inputs: the fake inputs, in order.
        layers: functions that run the layers that the graph calls, by path.
        mode: the fake tensor mode.

    Raises:
        Exception: any error that an operator raises for tensors without values.
    """
    recorded, saved = Recorded(), weakref.WeakSet[_Kept]()
    own: set[int] = set()
    values: dict[fx.Node, Any] = {}
    tensors: dict[str, Any] = {}
    waiting = iter(inputs)

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        saved.add(kept)
        return kept

    def storage_of(tensor: Tensor) -> int:
        address = storage_key(tensor)
        recorded.sizes[address] = tensor.untyped_storage().nbytes()
        return address

    counting = _Counting()
    with mode, torch.enable_grad(), counting, torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for node in graph.nodes:
            if node.op == "output":
                recorded.results = fx.node.map_arg(node.args[0], values.__getitem__)
                continue
            before = counting.flops
            if node.op == "placeholder":
                value = next(waiting)
            elif node.op == "get_attr":
                name = str(node.target)
                if name not in tensors:
                    tensors[name] = pass_on(tensor_at(module, name), fake(tensor_at(module, name), mode))
                    own.add(storage_of(tensors[name]))
                value = tensors[name]
            else:
                args = fx.node.map_arg(node.args, values.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                if node.op == "call_module":
                    value = layers[str(node.target)](module.get_submodule(str(node.target)), *args)
                else:
                    value = node.target(*args, **kwargs)
            values[node] = value
            if counting.flops > before:
                recorded.flops[node] = counting.flops - before
            if isinstance(value, Tensor):
                recorded.storages[node] = storage_of(value)
            elif isinstance(value, (tuple, list)):
                recorded.several.add(node)
    recorded.outputs = frozenset(storage_of(t) for t in tree_flatten(recorded.results)[0] if isinstance(t, Tensor))
    # Release the values that no result needs, together with the tensors that autograd kept for them.
    values.clear()
    recorded.saved, recorded.own = frozenset(storage_of(each.tensor) for each in saved) - own, frozenset(own)
    return recorded
