"""Attentions whose kernel the model's own Python chooses: the graph of a layer computes what that kernel does."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from graftc.compiler.capture import capture
from graftc.compiler.capture.as_traced import math_attention
from graftc.specs.io import load_spec
from graftc.testing import same_bits
from tests.runtime.live.models import forced_apart

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.{q,v}"}}]}
HEADS, WIDTH = 3, 4


def tensors(seed: int, dtype: torch.dtype, groups: int = 1) -> list[Tensor]:
    own = torch.Generator().manual_seed(seed)
    shapes = (2, 2 * groups, 5, WIDTH), (2, 2, 7, WIDTH), (2, 2, 7, WIDTH)
    return [torch.randn(shape, generator=own).to(dtype) for shape in shapes]


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "float": {"attn_mask": torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(9))},
    "bool": {"attn_mask": torch.arange(35).reshape(1, 1, 5, 7) % 3 > 0},
    "a row sees nothing": {"attn_mask": torch.arange(5)[None, None, :, None].expand(1, 1, 5, 7) > 1},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "dropout": {"dropout_p": 0.4},
    "groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", MASKS)
def test_written_out_it_is_the_kernel_to_the_bit(how: str, dtype: torch.dtype) -> None:
    given = dict(MASKS[how])
    if how == "float":
        given["attn_mask"] = given["attn_mask"].to(dtype)
    query, key, value = tensors(0, dtype, groups=3 if how == "groups" else 1)
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = F.scaled_dot_product_attention(query, key, value, **given)
    torch.manual_seed(3)
    assert same_bits(math_attention(query, key, value, **given), wanted)


class Layer(nn.Module):
    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(HEADS * WIDTH, HEADS * WIDTH) for _ in range(4))
        self.kernel = kernel

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (each(x).view(*x.shape[:2], HEADS, WIDTH).transpose(1, 2) for each in (self.q, self.k, self.v))
        dropped = 0.2 if self.training else 0.0
        if self.kernel is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
        else:
            with sdpa_kernel(self.kernel):
                mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
        return x + self.o(mixed.transpose(1, 2).flatten(2))


class Stack(nn.Module):
    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(kernel) for _ in range(3))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, bias)
        return x


@pytest.mark.full
@pytest.mark.sample("False-None")
@pytest.mark.slow
@pytest.mark.parametrize("kernel", [SDPBackend.MATH, [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], None])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_the_source_to_the_bit(kernel: Any, training: bool) -> None:
    model = Stack(kernel).requires_grad_(False)
    given = {"x": torch.randn(2, 6, HEADS * WIDTH), "bias": torch.randn(2, 1, 6, 6)}
    compiled = forced_apart(load_spec(SPEC), model, given)
    model.train(training), compiled.train(training)
    for length in (6, 9):
        batch = {"x": torch.randn(3, length, HEADS * WIDTH), "bias": torch.randn(3, 1, length, length)}
        torch.manual_seed(1)
        wanted = model(**batch)
        torch.manual_seed(1)
        assert same_bits(compiled(**batch), wanted)
    program = compiled.compilation.program("train", "base")
    fused = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    assert bool(fused) == (kernel is None)


@pytest.mark.sample("None")
@pytest.mark.slow
@pytest.mark.parametrize("kernel", [SDPBackend.MATH, None])
def test_what_an_exporter_puts_in_its_place_is_not_the_models_choice(kernel: Any) -> None:
    """transformers traces every attention on a CPU with the reference kernel."""
    own = F.scaled_dot_product_attention

    def exported(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return own(query, *args, **kwargs)

    model = Stack(kernel).eval().requires_grad_(False)
    given = {"x": torch.randn(2, 6, HEADS * WIDTH), "bias": torch.randn(2, 1, 6, 6)}
    with mock.patch.object(capture, "_patches", lambda _: mock.patch.object(F, own.__name__, exported)):
        compiled = forced_apart(load_spec(SPEC), model, given).eval()
    assert same_bits(compiled(**given), model(**given))
    nodes = compiled.compilation.program("train", "base").graph.nodes
    assert any("scaled_dot_product" in str(node.target) for node in nodes) == (kernel is None)
