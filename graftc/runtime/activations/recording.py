"""What autograd keeps of a graph: the graph is run once on tensors without memory, and autograd is asked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from graftc.passes.core.ir.codegen import tensor_at
from graftc.passes.core.packing.gradients import pass_on

aten = torch.ops.aten
_ATTENTIONS = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_fused_attention_overrideable,
)
"""Fused attentions that torch has no count for."""

Layer = Callable[..., Any]
"""What runs a layer on fake tensors: ``layer(module, *inputs)``."""


@dataclass
class Recorded:
    """What was seen of one run.

    Attributes:
        storages: of every node whose value is one tensor, the storage that holds it, as a number.
        sizes: bytes of the storages.
        saved: storages that autograd keeps, those of parameters and buffers not counted.
        own: storages of parameters and buffers, which are there anyway.
        several: nodes whose value is several tensors.
        flops: of products and attentions, by node.
        outputs: storages that the graph hands out.
        results: what it hands out, fake.
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
        """Bytes that autograd keeps."""
        return sum(self.sizes[storage] for storage in self.saved)

    def owners(self) -> dict[int, fx.Node]:
        """The first node that has each storage: what made it."""
        found: dict[int, fx.Node] = {}
        for node, storage in self.storages.items():
            found.setdefault(storage, node)
        return found


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts floating point operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        elif packet in _ATTENTIONS:
            self.flops += sdpa_flop_count(*(tensor.shape for tensor in args[:3]))  # type: ignore[no-untyped-call]
        return result


class _Held:
    """What autograd keeps in a saved tensor's place."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """Tensors without memory in the place of others, new leaves that want gradients where these do. Those on the meta
    device, of which nobody knows where they will be, are on the CPU, whose operators say most of what they keep."""

    def made(tensor: Tensor) -> Tensor:
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with mode:
            found = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            return found.requires_grad_(tensor.requires_grad) if tensor.requires_grad else found

    return tree_map_only(Tensor, made, value)


def record(
    graph: fx.Graph, module: nn.Module, inputs: Sequence[Any], layers: Mapping[str, Layer], mode: FakeTensorMode
) -> Recorded:
    """Run a graph on fake tensors in grad mode.

    Args:
        graph: names tensors and layers relative to ``module``.
        module: has them; its tensors are looked at and not read.
        inputs: fake, in order.
        layers: what runs the layers that the graph calls, by path.
        mode: of the fake tensors.

    Raises:
        Exception: whatever an operator has against tensors without values.
    """
    found, held = Recorded(), weakref.WeakSet[_Held]()
    own: set[int] = set()
    values: dict[fx.Node, Any] = {}
    tensors: dict[str, Any] = {}
    waiting = iter(inputs)

    def pack(tensor: Tensor) -> _Held:
        kept = _Held(tensor)
        held.add(kept)
        return kept

    def storage_of(tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        address: int = storage._cdata
        found.sizes[address] = storage.nbytes()
        return address

    counting = _Counting()
    with mode, torch.enable_grad(), counting, torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        for node in graph.nodes:
            if node.op == "output":
                found.results = fx.node.map_arg(node.args[0], values.__getitem__)
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
                found.flops[node] = counting.flops - before
            if isinstance(value, Tensor):
                found.storages[node] = storage_of(value)
            elif isinstance(value, (tuple, list)):
                found.several.add(node)
    found.outputs = frozenset(storage_of(t) for t in tree_flatten(found.results)[0] if isinstance(t, Tensor))
    # What nothing of the result needs is let go, and with it what autograd kept for it.
    values.clear()
    found.saved, found.own = frozenset(storage_of(each.tensor) for each in held) - own, frozenset(own)
    return found
