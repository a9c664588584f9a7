"""Dropout with a stored mask: random draws, the operators, and graphs that contain them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import graftc
from graftc.passes.core.ops.decompositions import DECOMPOSITIONS
from graftc.passes.core.ops.dropout import LEVELS, level
from graftc.testing import perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted

draw = torch.ops.graftc.random_mask.default
drop = torch.ops.graftc.masked_dropout.default
LORA = {"method": "lora", "target": {"role": ["attn.q", "ffn.down"]}, "rank": 4, "dropout": 0.3}


def mask(x: Tensor, p: float, seed: int = 0) -> Tensor:
    """Return a mask drawn after ``manual_seed(seed)``."""
    torch.manual_seed(seed)
    drawn: Tensor = draw(x, p)
    return drawn


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("make", [draw, DECOMPOSITIONS[draw]], ids=["kernel", "decomposed"])
def test_it_drops_the_share_asked_for(p: float, make: Any) -> None:
    """The share is right overall, and along each axis it varies no more than coin flips do."""
    torch.manual_seed(0)
    kept = make(torch.empty(1000, 301), p).double()
    share = level(p) / LEVELS
    assert abs(float(kept.mean()) - (1 - share)) <= 5 * (share * (1 - share) / kept.numel()) ** 0.5
    for dim, count in ((0, 1000), (1, 301)):
        assert float(kept.mean(dim).std()) <= 1.3 * (share * (1 - share) / count) ** 0.5


def test_neighbours_are_dropped_independently() -> None:
    """Elements are independent although four share one random number and the tensor is filled in consecutive parts."""
    lost = (~mask(torch.empty(2**20), 0.1)).double()
    for distance in (1, 2, 3, 4, 2**13, 2**15):
        together = float((lost[:-distance] * lost[distance:]).mean())
        assert abs(together - 0.01) <= 6 * math.sqrt(0.01 / 2**20), distance


def test_each_of_the_four_elements_has_all_levels() -> None:
    """The share is right at each of the four positions within a draw, because draws use all of their bits."""
    lost = (~mask(torch.empty(2**20), 0.75)).double().view(-1, 4).mean(0)
    assert float((lost - 0.75).abs().max()) <= 6 * math.sqrt(0.75 * 0.25 / 2**18)


@pytest.mark.parametrize("p", [0.0, 1e-7, 0.05, 1 / 3, 0.999999, 1 - 1e-12])
def test_the_expectation_is_exact(p: float) -> None:
    """The probability is rounded to 1 / 65536, never to one; kept elements are scaled by the rounded one."""
    assert abs(level(p) / LEVELS - p) <= 1 / LEVELS
    assert level(p) < LEVELS
    kept = float(drop(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool), p))
    assert kept * (1 - level(p) / LEVELS) == pytest.approx(1, rel=1e-15)
    assert bool(draw(torch.empty(100), p).all()) or level(p) > 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7, 2**13 + 1), (2, 3, 4)])
def test_every_shape(shape: tuple[int, ...]) -> None:
    drawn = mask(torch.empty(shape), 0.5)
    assert (drawn.shape, drawn.dtype, drawn.is_contiguous()) == (torch.Size(shape), torch.bool, True)


def test_draws_follow_the_seed_and_not_the_layout() -> None:
    x = torch.randn(40, 50)
    first = mask(x, 0.5, seed=3)
    assert torch.equal(first, mask(x, 0.5, seed=3))
    assert torch.equal(first, mask(torch.randn(50, 40, dtype=torch.float64).t(), 0.5, seed=3))
    assert not torch.equal(first, draw(x, 0.5))
    assert not torch.equal(first, mask(x, 0.5, seed=4))


@pytest.mark.slow
def test_opcheck() -> None:
    """The schema, the fake kernels, autograd and traces with symbols pass torch's checks."""
    x = torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(drop, (x, mask(x, 0.3), 0.3))
    torch.library.opcheck(draw, (x, 0.3), test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.nondeterministic_seeded in draw.tags
    assert torch.Tag.nondeterministic_seeded not in drop.tags


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_without_values(device: str) -> None:
    """On meta and fake tensors, shapes, dtypes and strides are those of the real results."""
    real = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    kept = mask(real, 0.3)
    expected = drop(real, kept, 0.3)
    assert expected.stride() == real.stride()
    mode = FakeTensorMode()
    x = mode.from_tensor(real) if device == "fake" else real.to("meta")
    with mode if device == "fake" else nullcontext():
        drawn = draw(x, 0.3)
        dropped = drop(x, drawn, 0.3)
    assert (drawn.shape, drawn.dtype, drawn.stride()) == (kept.shape, kept.dtype, kept.stride())
    assert (dropped.shape, dropped.dtype, dropped.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_gradients() -> None:
    """First and second derivatives are right, in float64."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    kept = mask(x, 0.3)
    assert torch.autograd.gradcheck(lambda t: drop(t, kept, 0.3), x)
    assert torch.autograd.gradgradcheck(lambda t: drop(t * t, kept, 0.3), x)


def test_only_the_mask_is_kept() -> None:
    x = torch.randn(40, 30, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        drop(x, draw(x, 0.3), 0.3)
    assert [(t.dtype, t.numel()) for t in saved] == [(torch.bool, 1200)]


def test_the_decomposition_is_the_kernel() -> None:
    """The decomposition equals the kernel, and dropped elements become zero even if they were infinite."""
    x = torch.randn(7, 9)
    x[::2, ::2] = math.inf
    kept = mask(x, 0.4)
    assert torch.equal(DECOMPOSITIONS[drop](x, kept, 0.4), drop(x, kept, 0.4))
    assert bool((drop(x, kept, 0.4)[~kept] == 0).all())


def test_autocast_keeps_the_inputs_type() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert drop(x, draw(x, 0.5), 0.5).dtype == torch.float32
        assert drop(x.bfloat16(), draw(x.bfloat16(), 0.5), 0.5).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny Llama, which has no dropout of its own, with LoRA that has dropout; perturbed."""
    return adapted("llama", LORA, noise=0.1)


def step(run: Any, model: Any, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Return the logits and the adapters' gradients of a training step."""
    model.train()
    torch.manual_seed(seed)
    logits = run(**inputs_for(model)).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    return logits.detach(), list(torch.autograd.grad(logits.square().mean(), trained))


@pytest.mark.slow
def test_a_step_follows_the_seed(llama: Any) -> None:
    first, again, other = step(llama, llama, 5), step(llama, llama, 5), step(llama, llama, 6)
    assert torch.equal(first[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.slow
def test_there_is_none_in_eval_mode(llama: Any) -> None:
    """The eval graph contains neither operator, and nothing is drawn."""
    train, evaluated = (
        [n.target for n in llama.program(mode).graph.nodes if n.target in (draw, drop)] for mode in ("train", "eval")
    )
    assert train.count(draw) == train.count(drop) == 4
    assert not evaluated
    llama.eval()
    before = torch.get_rng_state()
    llama(**inputs_for(llama))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_code_draws_the_same(backend: str) -> None:
    """One full graph of a layer draws the same mask from the same seed, so the numbers agree up to rounding."""
    compiled = graftc.compile({"adapt": [{**LORA, "target": {"role": "attn.q"}}]}, tiny("llama", layers=1))
    perturb(compiled, 0.1)
    eager = step(compiled, compiled, 5)
    whole: Any = torch.compile(compiled, fullgraph=True, dynamic=True, backend=backend)
    actual = step(whole, compiled, 5)
    torch.testing.assert_close(actual[0], eager[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(actual[1], eager[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_checkpointed_layers_draw_the_same(llama: Any) -> None:
    """Recomputation in the backward pass drops the same elements."""
    once = step(llama, llama, 5)
    llama.gradient_checkpointing_enable()
    try:
        again = step(llama, llama, 5)
    finally:
        llama.gradient_checkpointing_disable()
    assert all(torch.equal(a, b) for a, b in zip([once[0], *once[1]], [again[0], *again[1]], strict=True))


@pytest.mark.slow
def test_a_step_under_autocast(llama: Any) -> None:
    plain, _ = step(llama, llama, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, gradients = step(llama, llama, 5)
    assert float((cast.float() - plain).abs().max() / plain.abs().max()) <= 3e-2
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.slow
def test_an_artifact_keeps_train_graphs(llama: Any, tmp_path: Path) -> None:
    """Loaded graphs contain the operators, and a step from the same seed is bit-identical."""
    llama.save(tmp_path / "kept")
    loaded = graftc.load(tmp_path / "kept", tiny("llama"))
    assert [n.target for n in loaded.program("train").graph.nodes].count(draw) == 4
    first, second = step(llama, llama, 5), step(loaded, loaded, 5)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.full
def test_a_train_graph_exports_to_aten(llama: Any, tmp_path: Path) -> None:
    """With the operators' ATen forms, torch alone can load an exported train graph, and it still drops elements."""
    from graftc.passes.core.ir.codegen import function_of

    program = llama.program("train").copy()
    for node in program.graph.nodes:
        node.target = DECOMPOSITIONS.get(node.target, node.target)

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules.update(llama.compilation.store.root._modules)

        def forward(self, *args: Tensor) -> Any:
            """Return the flat outputs."""
            return function_of(program.graph, self, torch.device("cpu"))(self, *args)

    inputs = inputs_for(llama)
    args = tuple(inputs[name] for name in program.signature)
    exported = torch.export.export(Plain().train(), args)
    torch.export.save(exported, tmp_path / "train.pt2")
    targets = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert not [t for t in targets if t.startswith("graftc")]
    run = torch.export.load(tmp_path / "train.pt2").module()
    first, second = run(*args)[0], run(*args)[0]
    assert not torch.equal(first, second)
