"""Small models of many families, and the roles of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.roles.flow import Flow
from graftc.compiler.roles.structure import Structure, captured_sizes, find_structure
from graftc.passes.core.ir.program import map_nodes
from graftc.passes.core.ir.shapes import Sizes
from tests.compiler.structure_models import HEADS, INNER, MODELS, VOCABULARY, D


@dataclass
class Captured:
    """A small model: its graph, its roles, and its tensors by name."""

    graph: fx.Graph
    structure: Structure
    tensors: dict[str, Tensor]
    axes: tuple[Axis, ...]
    flow: Flow = field(init=False)

    def __post_init__(self) -> None:
        sizes = captured_sizes(self.graph)
        self.flow = Flow(self.graph, Sizes(lambda symbol: sizes.get(symbol, 2)))

    def run(self, changed: Mapping[str, Tensor] | None = None) -> dict[fx.Node, Any]:
        """Compute every value of the graph, with some tensors replaced."""
        generator = torch.Generator().manual_seed(0)
        tensors = self.tensors | dict(changed or {})
        inputs = {a.name: example(a, generator) for a in self.axes}
        values: dict[fx.Node, Any] = {}
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    values[node] = inputs[node.name]
                elif node.op == "get_attr":
                    values[node] = tensors[str(node.target)]
                elif node.op == "call_function":
                    args = map_nodes(node.args, values.__getitem__)
                    values[node] = node.target(*args, **map_nodes(node.kwargs, values.__getitem__))
        return values


def example(axis: Axis, generator: torch.Generator) -> Tensor:
    sizes = {"batch": 2, "sequence": 5, "target_sequence": 4}
    shape = [sizes[a] if isinstance(a, str) else a for a in axis.axes]
    if axis.dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    if "mask" in axis.name:
        return torch.ones(shape, dtype=axis.dtype)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def captured(model: nn.Module, axes: list[Axis] | None = None) -> Captured:
    result = capture(CaptureRequest.of(model, axes, mode="eval"))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors = {name: t.detach() for name, t in tensors.items()} | result.constants
    program = result.program
    inputs = tuple(Axis(i.name, i.dtype, i.shape) for i in program.inputs)
    return Captured(program.graph, find_structure(program.graph, result.constants), tensors, inputs)


@cache
def family(name: str) -> Captured:
    torch.manual_seed(0)
    return captured(MODELS[name]())


VALUES = [Axis("x", torch.float32, ("batch", "sequence", D))]


class Misnamed(nn.Module):
    """Attention spelled out, with misleading names and a fused, interleaved projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict(self.parts()) for _ in range(2)])
        self.embedding = nn.Linear(D, 7)

    @staticmethod
    def parts() -> dict[str, nn.Module]:
        return {
            "v_proj": nn.Linear(D, D),
            "down_proj": nn.Linear(D, 2 * D),
            "gate": nn.Linear(D, D, bias=False),
            "q_proj": nn.Linear(D, INNER),
            "o_proj": nn.Linear(INNER, D),
        }

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            batch, length, _ = x.shape
            query = layer["v_proj"](x).view(batch, length, HEADS, -1).transpose(1, 2)
            both = layer["down_proj"](x).view(batch, length, D // HEADS, HEADS, 2)
            key, value = (both[..., i].permute(0, 3, 1, 2) for i in (1, 0))
            weights = torch.softmax(query @ key.transpose(-1, -2) / 3.0, -1)
            mixed = (weights @ value).transpose(1, 2).reshape(batch, length, D)
            x = x + layer["gate"](mixed)
            x = x + layer["o_proj"](torch.relu(layer["q_proj"](x)))
        logits: Tensor = self.embedding(x)
        return logits


class Packed(nn.Module):
    """PyTorch's own layers, which read slices of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, HEADS, INNER, batch_first=True), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, HEADS, INNER, batch_first=True), 2)
        self.out = nn.Linear(D, 7)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        logits: Tensor = self.out(self.decoder(y, self.encoder(x), tgt_mask=mask, tgt_is_causal=True))
        return logits


class Einsum(nn.Module):
    """Attention in index notation: keys written in place, and scores plus a bias that depends on the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleList([nn.Linear(D, D) for _ in range(3)] + [nn.Linear(D, D, bias=False)]) for _ in range(2)]
        )

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = None
        for first, second, third, last in self.layers:  # type: ignore[misc]
            heads = [f(x).unflatten(-1, (HEADS, -1)) for f in (first, second, third)]
            key = torch.zeros_like(heads[1])
            key[..., :5] = heads[1][..., 7:]
            key[..., 5:] = heads[2][..., 5:]
            scores = torch.einsum("bqhd,bkhd->bhqk", heads[0], key)
            bias = scores if bias is None else bias
            weights = torch.softmax(scores + bias, -1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, heads[2])
            x = x + last(mixed.flatten(-2))
        return x


class Behind(nn.Module):
    """A residual branch over what comes after the first tokens, as a Q-Former's over its text."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 4:]
        result: Tensor = x + self.down(torch.relu(self.up(x)))
        return result


class Odd(nn.Module):
    """Residual branches of no known form."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(D, INNER), nn.Linear(INNER, INNER), nn.Linear(INNER, D)
        self.lone = nn.Linear(D, D)
        self.left, self.right, self.join = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)
        self.plain, self.other, self.last = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)
        self.halves, self.close = nn.Linear(D, 2 * INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        x = x + self.lone(x)
        x = x + self.join(self.left(x) + torch.relu(self.right(x)))
        x = x + self.last(self.plain(x) * self.other(x))
        return x + self.close(nn.functional.glu(self.halves(x)))
