"""LoRA in plain PyTorch as in libraries of hand-written kernels, for the one architecture that it is written for.

An update is added to the result in place, gradients of an input are accumulated in one tensor, and a gate and a norm
save only their inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.train.contestants import PROJECTIONS, Entry, Live
from benchmarks.train.models import Base, fill, shared_copy

ALPHA = 16


class _Update(torch.autograd.Function):
    """The autograd function ``x @ w.T + scale * (x @ a.T) @ b.T``, where ``scale`` is alpha over rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        hidden = x.flatten(0, -2) @ a.t()
        result = nn.functional.linear(x, w)
        result.flatten(0, -2).addmm_(hidden, b.t(), alpha=scale)
        ctx.scale = scale
        ctx.save_for_backward(x, w, a, b, hidden)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w, a, b, hidden = ctx.saved_tensors
        rows, flat = grad.flatten(0, -2), x.flatten(0, -2)
        narrow = (rows @ b).mul_(ctx.scale)
        grad_x = rows @ w
        grad_x.addmm_(narrow, a)
        grad_b = (hidden.t() @ rows).t().mul(ctx.scale)
        return grad_x.view_as(x), None, narrow.t() @ flat, grad_b, None


class _Gate(torch.autograd.Function):
    """The autograd function ``silu(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        act = nn.functional.silu(gate)
        return torch.ops.aten.silu_backward(grad * up, gate), act.mul_(grad)


class _Norm(torch.autograd.Function):
    """A root-mean-square norm whose gain does not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
        factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, gain, factor)
        return (x * factor).mul_(gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, gain, factor = ctx.saved_tensors
        scaled = grad * gain
        mean = (scaled * x).mean(-1, keepdim=True)
        return scaled.mul_(factor).addcmul_(x, mean * factor.pow(3), value=-1), None, None


class _Adapted(nn.Module):
    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.weight = base.weight
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.weight, self.lora_B.weight
        result: Tensor = _Update.apply(x, self.weight, a, b, ALPHA / len(a))  # type: ignore[no-untyped-call]
        return result


class _FeedForward(nn.Module):
    def __init__(self, own: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = own.gate_proj, own.up_proj, own.down_proj

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(_Gate.apply(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-untyped-call]


class _RootMeanSquare(nn.Module):
    def __init__(self, own: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = own.weight, own.variance_epsilon

    def forward(self, x: Tensor) -> Any:
        return _Norm.apply(x, self.weight, self.epsilon)  # type: ignore[no-untyped-call]


def by_hand(name: str, peer: str) -> Entry:
    """Build an entry with hand-written LoRA on all projections."""

    def make(base: Base) -> Live:
        model: Any = shared_copy(base.model)
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for projection in PROJECTIONS:
                    if hasattr(part, projection):
                        setattr(part, projection, _Adapted(getattr(part, projection), base.shape.rank))
            layer.mlp = _FeedForward(layer.mlp)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, norm, _RootMeanSquare(getattr(layer, norm)))
        return Live(model.train(), lambda: model(**base.batch).loss, fill(model))

    return Entry(name, "torch", make, peer, exact=True)
