"""Layers that cannot be graphs are split in turn: their parts are graphs, and maps only if parts cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.elements.calls import elements_in
from graftc.testing import perturb
from tests.zoo.sized_images import qwen3_vl_moe

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.{q,up}"}}]}


class Mixer(nn.Module):
    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.q, self.o, self.asks = nn.Linear(8, 6), nn.Linear(6, 8), asks

    def forward(self, x: Tensor) -> Tensor:
        y = self.q(x)
        if self.asks and float(y.sum()) > 1e9:
            y = y * 2
        return self.o(torch.tanh(y))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Layer(nn.Module):
    """A layer that reads a value between its parts; its first part may as well."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.mixer, self.ffn = Mixer(asks), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.ffn(x) if float(x.sum()) < 1e9 else x


class Stack(nn.Module):
    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer(asks) for _ in range(3)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack(asks: bool) -> tuple[Stack, Any]:
    torch.manual_seed(0)
    model = Stack(asks).eval()
    return model, graftc.compile(SPEC, model, {"x": torch.randn(2, 7, 8)}, cache=False).eval()


@pytest.mark.full
def test_parts_that_hold_everything_are_as_good_as_layers() -> None:
    _, compiled = stack(asks=False)
    elements = set(elements_in(compiled.compilation.flags))
    assert elements == {*(f"layers.{i}.{part}" for i in range(3) for part in ("mixer", "ffn")), "head"}
    (row,) = compiled.report.stacks
    assert (row.stack, row.level) == ("layers", "layers") and "test_parts.py" in row.reason
    assert any("parts of layers are graphs" in note for note in compiled.report.notes)
    graftc.compile({**SPEC, "capture": "layers"}, Stack(False).eval(), {"x": torch.randn(2, 7, 8)}, cache=False)


@pytest.mark.full
@pytest.mark.slow
def test_maps_are_taken_where_a_part_is_no_graph_either() -> None:
    _, compiled = stack(asks=True)
    elements = set(elements_in(compiled.compilation.flags))
    assert {"layers.1.mixer.q", "layers.1.mixer.o", "layers.1.ffn"} <= elements
    assert not elements & {"layers.1.mixer", "layers.1.ffn.up"}
    (row,) = compiled.report.stacks
    assert row.level == "modules" and "test_parts.py" in row.reason
    with pytest.raises(graftc.GraftError, match=r"GC030: the layers of layers cannot be graphs"):
        graftc.compile({**SPEC, "capture": "layers"}, Stack(True).eval(), {"x": torch.randn(2, 7, 8)}, cache=False)


@pytest.mark.sample("True")
@pytest.mark.slow
@pytest.mark.parametrize("asks", [False, True])
def test_it_computes_trains_merges_saves_and_loads(asks: bool, tmp_path: Path) -> None:
    model, compiled = stack(asks)
    for rows, length in ((2, 7), (1, 1), (3, 4)):
        x = torch.randn(rows, length, 8)
        assert torch.equal(compiled(x), model(x))
    perturb(compiled)
    x = torch.randn(3, 5, 8)
    merged = compiled.merge()
    torch.testing.assert_close(merged(x), compiled(x), rtol=1e-5, atol=1e-6)
    assert not torch.equal(compiled(x), model(x))
    folded = merged.folded_state_dict()
    twin = Stack(asks).eval()
    twin.load_state_dict(folded)
    torch.testing.assert_close(twin(x), compiled(x), rtol=1e-5, atol=1e-6)

    # The gradient of B follows from that of the folded weight W + BA: dW A^T, scaled.
    compiled.train()(x).square().sum().backward()
    twin.train()(x).square().sum().backward()
    tensors = dict(compiled.named_parameters())
    a = tensors["layers.1.ffn.up.graftc.lora.A"]
    scaling = 2 / 2 if (spec := compiled.compilation.spec.adapt[0]).alpha is None else spec.alpha / 2
    wanted = twin.layers[1].ffn.up.weight.grad @ a.T * scaling
    actual = tensors["layers.1.ffn.up.graftc.lora.B"].grad
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))

    compiled.eval().save(tmp_path / "saved")
    again = graftc.load(tmp_path / "saved", model).eval()
    assert torch.equal(again(x), compiled(x))
    assert elements_in(again.compilation.flags) == elements_in(compiled.compilation.flags)


@pytest.mark.full
def test_what_graphs_of_layers_read_is_not_read_between_graphs() -> None:
    """The vision blocks are not graphs and are examined again; the experts of the text layers are in graphs."""
    small = qwen3_vl_moe()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "experts"}}]}
    compiled = graftc.compile(spec, small.model, small.first, cache=False).eval()
    levels = {stack.stack: stack.level for stack in compiled.report.stacks}
    assert levels["model.language_model.layers"] == "layers" and levels["model.visual.blocks"] != "graph"
    with torch.no_grad():
        before = compiled(**small.first).logits
        assert torch.equal(before, small.model(**small.first).logits)
        perturb(compiled, 0.2)
        after = compiled(**small.first).logits
    assert not torch.allclose(before, after)
    merged = compiled.merge()
    assert torch.allclose(merged(**small.first).logits, after, atol=1e-5)
