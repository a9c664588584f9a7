"""The message and the cost of a refused capture, and sizes in which a model does not vary."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.refusals import by_values
from graftc.specs.errors.diagnostics import GraftError

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "last"}}]}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x)
        return result


class Layered(nn.Module):
    """Layers that are alike, so a capture first tries to trace one of them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))
        self.last = nn.Linear(4, 4)

    def decided(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        result: Tensor = self.last(self.decided(x))
        return result


class Branching(Layered):
    def decided(self, x: Tensor) -> Tensor:
        return 2 * x if x.sum() > 0 else x  # here: a branch


class Sized(Layered):
    def decided(self, x: Tensor) -> Tensor:
        return x[:, : int(x.abs().max().item())]  # here: a size


class Looping(Layered):
    def decided(self, x: Tensor) -> Tensor:
        while x.norm() > 1:  # here: a loop
            x = x / 2
        return x


class AsAnArray(Layered):
    def decided(self, x: Tensor) -> Tensor:
        return x + float(x.detach().numpy().shape[0])  # here: an array of numpy


class ThroughNumpy(Layered):
    def decided(self, x: Tensor) -> Tensor:
        return x * float(numpy.asarray(x.detach()).ndim)  # here: an array of numpy, made by that


@pytest.mark.parametrize("model", [Branching, Sized, Looping, AsAnArray, ThroughNumpy])
def test_one_trace_and_the_place(model: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    original, called = torch.export.export, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        called.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    with pytest.raises(GraftError) as caught:
        graftc.compile({**SPEC, "capture": "graph"}, model(), {"x": torch.randn(2, 5, 4)}, cache=False)
    assert caught.value.code == "GC030" and len(called) == 1
    with open(__file__, encoding="utf-8") as file:
        lines = file.read().split("\n")
    start = lines.index(f"class {model.__name__}(Layered):")
    line = next(number for number, text in enumerate(lines[start:], start + 1) if "# here" in text)
    assert f"{__file__}:{line} in decided" in caught.value.message


def test_a_circle_of_causes() -> None:
    """An error may lead to itself, where one that was stored is raised again."""

    class CircularError(Exception):
        asked = False

        @property
        def __cause__(self) -> CircularError:  # type: ignore[override]
            assert not self.asked
            self.asked = True
            return self

    assert not by_values(CircularError())


class OverTime(nn.Module):
    """Tokens with a linear map over time, which fixes one length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.table, self.time, self.last = nn.Embedding(50, 16), nn.Linear(length, length), nn.Linear(16, 4)

    def forward(self, tokens: Tensor, scale: Tensor | None = None) -> Tensor:
        states = self.time(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        result: Tensor = self.last(states if scale is None else states * scale[..., None])
        return result


@pytest.mark.sample("True-1", "True-7", "False-1", "True-30")
@pytest.mark.slow
@pytest.mark.parametrize("length", [12, 7, 1, 30])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_fixed_length(length: int, scaled: bool) -> None:
    torch.manual_seed(0)
    model = OverTime(length).eval()

    def inputs(rows: int, length: int) -> dict[str, Tensor]:
        given = {"tokens": torch.randint(0, 50, (rows, length))}
        return {**given, "scale": torch.rand(rows, length)} if scaled else given

    compiled = graftc.compile(SPEC, model, inputs(2, length)).eval()
    for rows in (1, 5):
        given = inputs(rows, length)
        torch.testing.assert_close(compiled(**given), model(**given))
    if length not in (1, 7):  # lengths that a capture tries itself, and the one that broadcasts
        assert any(f"size {length} of axis 1 of tokens is fixed" in note for note in compiled.compilation.notes)
    with pytest.raises(GraftError) as caught:
        compiled(**inputs(2, length + 1))
    assert caught.value.code == "GC031"
