"""The first graph holds for the inputs that were shown, and is checked on them if the model accepts no samples."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.up"}}]}
Pair = namedtuple("Pair", ["first", "second"])


class OneByOne(nn.Module):
    """A model that processes the rows of a batch one after the other, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.up(row) for row in x.split(1)])


@pytest.mark.slow
def test_an_axis_that_is_bound_is_captured_as_it_was_shown_and_no_other() -> None:
    torch.manual_seed(0)
    model = OneByOne().eval()
    compiled = graftc.compile(SPEC, model, {"x": torch.randn(4, 9, 6)}, cache=False).eval()
    (spec,) = compiled.compilation.program("train", "base").inputs
    assert spec.ranges[0] == (4, 4) and spec.ranges[1][1] is None
    assert any("one batch size only, here 4" in note for note in compiled.report.notes)
    for length in (9, 1, 30):
        x = torch.randn(4, length, 6)
        assert torch.equal(compiled(x), model(x))
    assert len(compiled.compilation.signatures) == 1
    for rows, length in ((2, 5), (2, 11), (2, 3)):
        x = torch.randn(rows, length, 6)
        assert torch.equal(compiled(x), model(x))
    assert len(compiled.compilation.signatures) == 2  # one for two rows, of any length


class Short(nn.Module):
    """A model whose computation of longer texts depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.up = nn.Linear(6, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        if x.shape[1] > 8 and float(x.sum()) > 1e9:
            x = -x
        for layer in self.layers:
            x = layer(x)
        return self.up(x)


@pytest.mark.slow
def test_a_graph_for_other_sizes_than_those_shown_is_none() -> None:
    """Samples are short: if only they were checked, there would be a graph that fits none of the user's calls."""
    torch.manual_seed(0)
    model = Short().eval()
    compiled = graftc.compile(SPEC, model, {"input_ids": torch.randint(20, (2, 16))}, cache=False).eval()
    assert [row.level for row in compiled.report.stacks] == ["layers"]
    for length in (16, 5, 9):
        ids = torch.randint(20, (2, length))
        assert torch.equal(compiled(ids), model(ids))
    short = graftc.compile(SPEC, model, {"input_ids": torch.randint(20, (2, 5))}, cache=False)
    assert [row.level for row in short.report.stacks] == ["graph"]


class Marked(nn.Module):
    """A model that refuses inputs without its mark, which samples seldom have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(5000, 6), nn.Linear(6, 8)

    def forward(self, ids: Tensor) -> Tensor:
        torch._check_tensor_all((ids[:, 0] == 4711).all(), lambda: "there is no mark, so")
        return self.up(self.embed(ids))


@pytest.mark.slow
def test_a_model_that_takes_no_samples_is_held_against_what_was_shown() -> None:
    torch.manual_seed(0)
    model = Marked().eval()
    ids = torch.randint(0, 5000, (2, 7))
    ids[:, 0] = 4711
    anchors = graftc.compile(SPEC, model, {"ids": ids}, cache=False).report.anchors
    assert [(anchor.difference, anchor.skipped, anchor.plain) for anchor in anchors] == [(0.0, "", False)] * 2
    (first, *_) = graftc.compile(SPEC, model, {"ids": torch.zeros(2, 7, dtype=torch.long)}, cache=False).report.anchors
    assert first.difference is None and "there is no mark" in first.skipped


class Chunks(nn.Module):
    """A model that divides sizes with torch, as Longformer does, making tensors of them, and returns a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Pair:
        count = torch.div(x.shape[1], 2, rounding_mode="trunc")
        rows = x.view(x.shape[0], count, 2, 6).transpose(1, 2).reshape(x.shape[0], count + count, 6)
        return Pair(self.down(self.up(rows)), {"share": rows / torch.div(x.shape[1], 4)})


class Chunked(nn.Module):
    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.layers, self.asks = nn.ModuleList(Chunks() for _ in range(2)), asks

    def forward(self, x: Tensor) -> Pair:
        share = x
        for layer in self.layers:
            x, extra = layer(x)
            share = extra["share"]
            if self.asks and float(x.sum()) > 1e9:
                break
        return Pair(x, {"share": share})


@pytest.mark.sample("False-graph")
@pytest.mark.slow
@pytest.mark.parametrize(("asks", "level"), [(False, "graph"), (True, "layers")])
def test_sizes_that_torch_divides_are_sizes_and_named_tuples_stay_what_they_are(asks: bool, level: str) -> None:
    torch.manual_seed(0)
    model = Chunked(asks).eval()
    compiled = graftc.compile(SPEC, model, {"x": torch.randn(2, 8, 6)}, cache=False).eval()
    assert [row.level for row in compiled.report.stacks] == [level]
    for length in (8, 4, 20):
        x = torch.randn(3, length, 6)
        ours, theirs = compiled(x), model(x)
        assert type(ours) is Pair and torch.equal(ours.first, theirs.first)
        assert torch.equal(ours.second["share"], theirs.second["share"])


class OfABuffer(nn.Module):
    """A linear map of a stored tensor, as in the position tables of Swin v2."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.randn(5, 6))
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.places)))


def test_a_linear_map_of_a_stored_tensor_is_a_place() -> None:
    torch.manual_seed(0)
    model = OfABuffer().eval()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**{up,down}"}}]}
    compiled = graftc.compile(spec, model, {"x": torch.randn(2, 5, 6)}, cache=False).eval()
    x = torch.randn(2, 5, 6)
    assert torch.equal(compiled(x), model(x))
    perturb(compiled)
    twin = OfABuffer().eval()
    twin.load_state_dict(compiled.merge().folded_state_dict())
    assert not torch.equal(compiled(x), model(x))
    torch.testing.assert_close(twin(x), compiled(x), rtol=1e-5, atol=1e-6)
