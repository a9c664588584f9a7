"""Masked gradients: random draws, the operators, and what they save."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from graftc.passes.core.ops import gradients
from graftc.passes.core.ops.decompositions import DECOMPOSITIONS
from graftc.passes.core.ops.hashing import wrapped

view = torch.ops.graftc.grad_mask.default
masked = torch.ops.graftc.masked_gradient.default
SEED = torch.tensor([123_456_789_012_345])


def step(number: int) -> Tensor:
    """Return a step count as a tensor."""
    return torch.tensor([number])


def mask(shape: tuple[int, ...], number: int = 0, p: float = 0.3, seed: Tensor = SEED) -> Tensor:
    """Return the masked gradient of ones, times ``p``: ones and zeros in float64."""
    scaled: Tensor = masked(torch.ones(shape, dtype=torch.float64), step(number), seed, p)
    return (scaled * p).round()


def reference(count: int, number: int, seed: int, p: float) -> list[bool]:
    """Compute the mask with Python's unbounded integers."""
    z = (seed + number * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    z ^= z >> 31
    low, high = z % 2**31, (z >> 31) % 2**31
    kept = []
    for element in range(count):
        x = (element * (2 * high + 1) + low) % 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        x ^= x >> 16
        kept.append((x ^ 2**31) >= 2**32 - p * 2**32)
    return kept


@pytest.mark.parametrize("number", [0, 1, 99_999])
def test_the_hash_is_the_one_that_it_is_said_to_be(number: int) -> None:
    """The hash is SplitMix64 of the step and lowbias32 of the element, for seeds of either sign."""
    for seed in (0, 7, 2**62 - 1, -5):
        actual = mask((300,), number, 0.25, torch.tensor([seed])).bool().tolist()
        assert actual == reference(300, number, seed % 2**64, 0.25)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_it_keeps_the_share_asked_for(p: float) -> None:
    """The share is right overall, and along each axis it varies no more than coin flips do."""
    kept = mask((1000, 301), p=p)
    assert abs(float(kept.mean()) - p) <= 5 * (p * (1 - p) / kept.numel()) ** 0.5
    for dim, count in ((0, 1000), (1, 301)):
        assert float(kept.mean(dim).std()) <= 1.3 * (p * (1 - p) / count) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.1, 0.3])
def test_the_mean_over_steps_is_the_gradient(p: float) -> None:
    """The mean of all elements and that of each of 400 are within five standard errors, spread as coin flips are."""
    steps = 4000
    total = torch.stack([masked(torch.ones(400), step(number), SEED, p) for number in range(steps)]).double()
    error = ((1 - p) / p / steps) ** 0.5
    assert abs(float(total.mean()) - 1) <= 5 * error / 400**0.5
    means = total.mean(0)
    assert float((means - 1).abs().max()) <= 5 * error
    assert 0.85 * error <= float(means.std()) <= 1.15 * error


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 1000, 2**31, 2**40])
def test_steps_are_independent(lag: int) -> None:
    both = mask((400, 500), 5, 0.3) * mask((400, 500), 5 + lag, 0.3)
    assert abs(float(both.mean()) - 0.09) <= 5 * math.sqrt(0.09 * 0.91 / 200_000)


@pytest.mark.parametrize("distance", [1, 2, 3, 500, 2**16, 2**16 + 1])
def test_neighbours_are_independent(distance: int) -> None:
    """Neighbours within a part and across parts are independent."""
    kept = mask((2**18,))
    both = kept[:-distance] * kept[distance:]
    assert abs(float(both.mean()) - 0.09) <= 6 * math.sqrt(0.09 / 2**18)


def test_seeds_are_independent() -> None:
    first = mask((400, 500), 3)
    for other in (0, 1, 123_456_789_012_344, 2**40):
        both = first * mask((400, 500), 3, seed=torch.tensor([other]))
        assert abs(float(both.mean()) - 0.09) <= 5 * math.sqrt(0.09 * 0.91 / 200_000)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (0, 4), (2, 3, 4, 5), (3, 1000), (1, 1, 1000), (2, 150, 7)])
@pytest.mark.parametrize("most", [1, 7, 100])
def test_parts_make_no_difference(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], most: int) -> None:
    """Elements are numbered consecutively, however many are masked at a time, across rows or within one."""
    whole = mask(shape)
    monkeypatch.setattr(gradients, "_PART", most)
    assert torch.equal(mask(shape), whole)
    assert torch.equal(whole.flatten(), mask((math.prod(shape),)))


def test_parts_are_all_of_it() -> None:
    """Each element occurs once, with its number, also beyond 32 bits, where numbers wrap."""
    tensor = torch.empty(3, 2**32, 5, device="meta")
    parts = [(part.numel(), first) for part, first in gradients._parts(tensor, 2**31)]
    assert sum(count for count, _ in parts) == tensor.numel() and max(count for count, _ in parts) <= 2**31
    assert all(a + count == b for (count, a), (_, b) in pairwise(parts))
    numbers = [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5]
    assert [wrapped(number) for number in numbers] == [0, 2**31 - 1, -(2**31), -1, 0, 5]


def test_layouts_make_no_difference() -> None:
    """Elements are numbered by position, and the result has the gradient's layout."""
    grad = torch.randn(2, 3, 40, 50)
    expected = masked(grad, step(4), SEED, 0.3)
    for other in (grad.to(memory_format=torch.channels_last), grad.transpose(0, 3).contiguous().transpose(0, 3)):
        actual = masked(other, step(4), SEED, 0.3)
        assert torch.equal(actual, expected) and actual.stride() == other.stride()
    wide = torch.ones(1, 4).expand(100, 4)
    assert torch.equal(masked(wide, step(4), SEED, 0.3), masked(wide.contiguous(), step(4), SEED, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kept_elements_are_divided_and_others_gone(dtype: torch.dtype) -> None:
    """The result has the gradient's dtype and is rounded once; infinities that are not kept become zero."""
    grad = torch.randn(40, 30, dtype=torch.float64).to(dtype)
    grad[::7] = math.inf
    kept = mask((40, 30)).bool()
    actual = masked(grad, step(0), SEED, 0.3)
    wide = torch.promote_types(dtype, torch.float32)
    assert actual.dtype == dtype
    assert torch.equal(actual, torch.where(kept, grad.to(wide) * (1 / 0.3), 0).to(dtype))
    assert torch.equal(masked(grad, step(0), SEED, 1.0), grad)


class _Sizes(TorchDispatchMode):
    """A dispatch mode that records the sizes in bytes of the results of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.sizes.append(out.untyped_storage().nbytes())
        return out


def test_a_mask_takes_parts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the result, nothing larger than one number per element of a part is created."""
    monkeypatch.setattr(gradients, "_PART", 64)
    grad = torch.randn(100, 40, dtype=torch.bfloat16)
    with _Sizes() as noted:
        gradients._masked(grad, step(0), SEED, 0.3)
    assert max(noted.sizes) == 100 * 40 * 2
    assert max(size for size in noted.sizes if size != 100 * 40 * 2) <= 64 * 4


@pytest.mark.slow
def test_opcheck() -> None:
    """The schema, the fake kernels, autograd and traces with symbols pass torch's checks."""
    x = torch.randn(3, 5, requires_grad=True)
    for op in (view, masked):
        torch.library.opcheck(op, (x, step(2), SEED, 0.3))


def test_it_is_a_view_that_saves_nothing() -> None:
    """The tensor is not copied, only two numbers are saved, and the gradient is that of the operator."""
    x = torch.randn(40, 30, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = view(x, step(3), SEED, 0.3)
    assert y.data_ptr() == x.data_ptr() and y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert [tensor.numel() for tensor in saved] == [1, 1]
    y.square().sum().backward()
    assert torch.equal(x.grad, masked(2 * x.detach(), step(3), SEED, 0.3))
    with torch.no_grad():
        assert view(x, step(3), SEED, 0.3).data_ptr() == x.data_ptr()
    assert DECOMPOSITIONS[view](x, step(3), SEED, 0.3).data_ptr() == x.data_ptr()


def test_the_incoming_gradient_is_left_alone() -> None:
    """A sum passes one gradient to both of its terms, so it must not be written to."""
    x, other = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    given = torch.randn(6, 5)
    before = given.clone()
    torch.autograd.backward(view(x, step(0), SEED, 0.3) + other, given)
    assert torch.equal(other.grad, before) and torch.equal(given, before)
    assert not torch.equal(x.grad, before)


def test_gradients() -> None:
    """Masking is linear in the gradient, and second derivatives are masked as well."""
    grad = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: masked(t, step(1), SEED, 0.3), grad)
    assert torch.autograd.gradgradcheck(lambda t: masked(t * t, step(1), SEED, 0.3), grad)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(view(x, step(1), SEED, 0.5).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second != 0, mask((4, 6), 1, 0.5).bool())


def test_a_step_that_is_counted_too_early_is_an_error() -> None:
    """Counting between the forward and the backward pass raises, because the mask would be another step's."""
    x, count = torch.randn(3, requires_grad=True), step(0)
    y = view(x, count, SEED, 0.3)
    count.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values(device: str) -> None:
    """On meta and fake tensors, shapes, dtypes and strides are those of the real results."""
    real = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    mode = FakeTensorMode()
    x, *others = (mode.from_tensor(t) if device == "fake" else t.to("meta") for t in (real, step(0), SEED))
    with mode if device == "fake" else nullcontext():
        for result in (view(x, *others, 0.3), masked(x, *others, 0.3)):
            assert (result.shape, result.dtype, result.stride()) == (real.shape, real.dtype, real.stride())


def test_autocast_keeps_the_type() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = view(x, step(0), SEED, 0.5)
        assert y.dtype == torch.float32
        torch.nn.functional.linear(torch.ones(2, 4), y).sum().backward()
    assert x.grad.dtype == torch.float32 and bool((x.grad == 0).any())


class Map(nn.Module):
    """A linear map whose weight has a masked gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))
        self.register_buffer("step", step(3))
        self.register_buffer("seed", SEED.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return its outputs."""
        return torch.nn.functional.linear(x, view(self.weight, self.step, self.seed, 0.3))


def gradient(module: Map, run: Any, x: Tensor) -> Tensor:
    """Return the weight's gradient of a run."""
    module.weight.grad = None
    run(x).square().sum().backward()
    assert module.weight.grad is not None
    return module.weight.grad


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_traced_and_compiled(backend: str) -> None:
    """It compiles into one graph, in training and without gradients; counting steps recompiles nothing."""
    module, x = Map(), torch.randn(3, 5)
    whole: Any = torch.compile(module, fullgraph=True, backend=backend)
    for _ in range(2):
        with torch._dynamo.config.patch(error_on_recompile=bool(module.step > 3)):
            expected, actual = gradient(module, module, x), gradient(module, whole, x)
        assert torch.equal(actual == 0, expected == 0) and bool((actual == 0).any())
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        module.step.add_(1)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(whole(x), module(x))


def test_an_exported_train_graph_masks() -> None:
    """The exported graph contains the operator, which masks gradients there as well."""
    module, x = Map(), torch.randn(3, 5)
    expected = gradient(module, module, x).clone()
    exported = torch.export.export(module, (x,))
    assert view in [node.target for node in exported.graph.nodes]
    again, module.weight.grad = exported.module(), None
    again(x).square().sum().backward()
    assert torch.equal(dict(again.named_parameters())["weight"].grad, expected)
