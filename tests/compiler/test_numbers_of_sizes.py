"""Graphs that compute with their sizes: ratios, roots, slices; on sizes other than those of the capture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb
from tests.kit.refusals import refused

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["inner"]}}]}
WAYS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ratio": lambda y, n: y * (n / 3.0),
    "root": lambda y, n: y / n**0.5,
    "whole ratio": lambda y, n: y * (n // 2),
    "remainder": lambda y, n: y + n % 3,
    "rounded": lambda y, n: y[: int(n * 0.5)],
    "first": lambda y, n: y[:5],
    "last": lambda y, n: y[-2:],
    "all but": lambda y, n: y[1:],
    "at most": lambda y, n: y[: min(5, n)],
    "chunks": lambda y, n: y.chunk(2)[0],
    "padding": lambda y, n: nn.functional.pad(y, (0, 0, 0, 10 - n)) if n <= 10 else y,
    "pooling": lambda y, n: nn.functional.adaptive_avg_pool1d(y.T, 2),
    "repeated": lambda y, n: y.repeat(2, 1) * n,
    "branch": lambda y, n: y * 2 if n > 5 else y * 3,
}


class Sized(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.inner, self.outer, self.way = nn.Linear(6, 8), nn.Linear(8, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return WAYS[self.way](self.outer(self.inner(x)), x.shape[0])


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("captured", [4, 7])
def test_every_size_is_as_the_model_has_it(way: str, captured: int, tmp_path: Path) -> None:
    """Results equal the model's when compiled, from the cache, and from an artifact."""
    torch.manual_seed(0)
    model = Sized(way).eval()
    compiled = graftc.compile(SPEC, model, (torch.randn(captured, 6),)).eval()
    inputs = [torch.randn(size, 6) for size in (captured, 2, 3, 5, 6, 9, 12)]
    for x in inputs:
        assert torch.equal(compiled(x), model(x)), len(x)
    perturb(compiled)
    expected = [compiled(x) for x in inputs]
    again = graftc.compile(SPEC, model, (torch.randn(captured, 6),)).eval()
    again.load_adapter_state_dict(compiled.adapter_state_dict())
    loaded = graftc.load(compiled.save(tmp_path / "artifact"), model).eval()
    for x, y in zip(inputs, expected, strict=True):
        assert torch.equal(again(x), y) and torch.equal(loaded(x), y)
    merged = compiled.merge()
    torch.testing.assert_close(merged(inputs[1]), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_inputs_of_another_type_say_so(dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    """The error has the model's own message and the dtype that it was compiled with."""
    compiled = graftc.compile(SPEC, Sized("ratio"), (torch.randn(4, 6),))
    error = refused(compiled, torch.ones(4, 6, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    assert error.code == "GC031" and error.hint == f"x is {name}; the model was compiled with float32"
    assert "Sized does not run with x: RuntimeError: mat1 and mat2 must have the same dtype" in error.message
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("shape", [(4, 7), (4, 1), (2, 3, 5)])
def test_inputs_of_another_width_say_so(shape: tuple[int, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """The error has numbers instead of symbols, and the tracer prints nothing to the terminal."""
    compiled = graftc.compile(SPEC, Sized("first"), (torch.randn(4, 6),))
    error = refused(compiled, torch.randn(shape))
    assert error.code == "GC031" and f"x{shape[-1]} and 6x8" in error.message
    assert error.hint is not None and "the model itself raises this: it was run with x f32[" in error.hint
    assert capfd.readouterr().err == ""


def test_no_inputs_say_so() -> None:
    compiled = graftc.compile(SPEC, Sized("first"), (torch.randn(4, 6),))
    assert "does not run with no inputs: TypeError" in refused(compiled).message


@pytest.mark.slow
def test_what_failed_changes_nothing() -> None:
    """A call that the model itself refuses is tried on the model, and leaves it unchanged."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["0"]}}]}
    compiled = graftc.compile(spec, model, (torch.randn(4, 6),))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    refused(compiled, torch.ones(4, 6, dtype=torch.float64))
    refused(compiled, torch.ones(4, 7))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state) and model.training


BETWEEN: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "equal": lambda y, b, n: y * 2 if b == n else y * 3,
    "fewer": lambda y, b, n: y * 2 if b < n else y * 3,
    "more": lambda y, b, n: y * 2 if b > n else y * 3,
    "not fewer": lambda y, b, n: y * 2 if b >= n else y * 3,
    "twice": lambda y, b, n: y * 2 if 2 * b == n else y * 3,
    "square": lambda y, b, n: y @ y.transpose(1, 2) if b * 2 >= n else y @ y.transpose(1, 2) + 1,
    "together": lambda y, b, n: y * 2 if b * n > 30 else y * 3,
    "divided": lambda y, b, n: y * 2 if (b * n) % 4 == 0 else y * 3,
    "one token": lambda y, b, n: y * 2 if n == 1 else y * 3,
    "one text": lambda y, b, n: y * 2 if b == 1 else y * 3,
    "one and one": lambda y, b, n: y * 2 if b == n == 1 else y * 3,
    "one text of many": lambda y, b, n: y * 2 if b == 1 and n > 1 else y * 3,
    "fewer than two": lambda y, b, n: y * 2 if n < 2 else y * 3,
    "squeezed": lambda y, b, n: y.squeeze(1),
    "squeezed wholly": lambda y, b, n: y.squeeze(),
}


class Between(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.embed, self.inner, self.way = nn.Embedding(9, 6), nn.Linear(6, 8), way

    def forward(self, input_ids: Tensor) -> Tensor:
        return BETWEEN[self.way](self.inner(self.embed(input_ids)), *input_ids.shape)


@pytest.mark.full
@pytest.mark.parametrize("way", BETWEEN)
def test_decisions_between_two_sizes(way: str, tmp_path: Path) -> None:
    """A graph is used for batch and token sizes that lead to the same decisions as those of the capture."""
    model = Between(way).eval()
    ids = {"input_ids": torch.ones(3, 7, dtype=torch.long)}
    compiled = graftc.compile(SPEC, model, ids).eval()
    sizes = [(3, 7), (4, 4), (7, 3), (2, 4), (5, 6), (1, 1), (4, 8), (9, 2), (6, 6), (4, 1), (1, 4)]
    inputs = [torch.randint(9, size) for size in sizes]
    for x in inputs:
        assert torch.equal(compiled(x), model(x)), tuple(x.shape)
    loaded = graftc.load(compiled.save(tmp_path / "artifact"), model).eval()
    for x in inputs:
        assert torch.equal(loaded(x), model(x)), tuple(x.shape)
    merged = compiled.merge(allow_unchanged=True)
    assert torch.equal(merged(inputs[0]), model(inputs[0]))


@pytest.mark.full
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_decision_of_one_mode(mode: str) -> None:
    """A size of 1 is special in one mode only."""
    model = Between("one token")
    BETWEEN["in a mode"] = lambda y, b, n: y * 2 if n == 1 and model.training == (mode == "train") else y * 3
    model.way = "in a mode"
    compiled = graftc.compile(SPEC, model, {"input_ids": torch.ones(3, 7, dtype=torch.long)}, cache=False)
    for training in (True, False):
        model.train(training)
        compiled.train(training)
        for size in ((3, 7), (3, 1), (1, 7)):
            x = torch.randint(9, size)
            assert torch.equal(compiled(x), model(x)), (training, size)
