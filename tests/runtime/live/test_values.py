"""Layers whose Python reads values: results that depend on them would be constants of a graph."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from graftc.compiler import pipeline
from tests.kit.models import fresh
from tests.kit.specs import lora
from tests.zoo.model import IMAGE, noise, texts
from tests.zoo.sized_images import qwen2_vl


class Segments(nn.Module):
    """A layer that averages over segments whose lengths are in a tensor; `how` selects the way of reading them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.how = nn.Linear(8, 8), how

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        read: Any = {"tolist": lengths.tolist, "numpy": lambda: [int(n) for n in lengths.numpy()]}[self.how]()
        parts = torch.split(self.up(x), read)
        return x + torch.cat([part - part.mean(0) for part in parts])


class Segmented(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Segments(how) for _ in range(2))

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[: 2 if float(x.sum()) < 1e9 else 1]:
            x = layer(x, lengths)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("how", ["tolist", "numpy"])
def test_values_that_are_read_from_memory_make_no_graph_of_a_layer(how: str) -> None:
    torch.manual_seed(0)
    model = Segmented(how).eval()
    x = torch.randn(12, 8)
    compiled = fresh(model, lora(modules="**.up"), inputs={"x": x, "lengths": torch.tensor([6, 6])}, cache=False).eval()
    (stack,) = compiled.report.stacks
    assert (stack.stack, stack.layers, stack.level) == ("layers", 2, "modules")
    assert "reads the values" in stack.reason and "test_values.py:" in stack.reason
    for lengths in ([6, 6], [4, 8], [3, 3, 6], [12]):
        given = {"x": x, "lengths": torch.tensor(lengths)}
        assert torch.equal(compiled(**given), model(**given)), lengths


class Rows(nn.Module):
    """A list of maps, which are layers, and Python that reads a value: a model that is split into several graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for own in self.maps[: 4 if float(x.sum()) < 1e9 else 1]:
            x = torch.tanh(own(x))
        return x


@pytest.mark.slow
def test_why_the_whole_is_no_graph_is_not_why_its_parts_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the whole must not be the context of later errors, whose context is searched for the reason."""
    handled, original = [], pipeline._compiled

    def noting(*args: Any) -> Any:
        handled.append(sys.exc_info()[1])
        return original(*args)

    monkeypatch.setattr(pipeline, "_compiled", noting)
    torch.manual_seed(0)
    model = Rows().eval()
    compiled = fresh(model, lora(modules="**.maps.*"), inputs={"x": torch.randn(3, 8)}, cache=False).eval()
    assert handled == [None, None]
    for rows in (3, 1, 5):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x), model(x))
    (stack,) = compiled.report.stacks
    assert stack.level == "layers" and "test_values.py" in stack.reason and "GC0" not in stack.reason


def images(rows: list[list[tuple[int, int]]], seed: int) -> dict[str, torch.Tensor]:
    """Return texts with images of these heights and widths in patches, as Qwen2-VL takes them."""
    inputs = texts([([h * w // 4 for h, w in row], 6) for row in rows], seed, enclosed=True)
    every = [size for row in rows for size in row]
    return {
        **inputs,
        "pixel_values": noise(seed, sum(h * w for h, w in every), 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([(1, h, w) for h, w in every]),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }


@pytest.mark.full
def test_images_of_one_size_do_not_make_a_graph_for_one_size() -> None:
    """transformers exports with another attention, which assumes that all images have the same size."""
    model = qwen2_vl().model
    compiled = fresh(model, lora(modules="**.qkv"), inputs=images([[(4, 8)], [(4, 8)]], 0), cache=False).eval()
    levels = {each.stack: each.level for each in compiled.report.stacks}
    assert levels["model.visual.blocks"] == "modules" and levels["model.language_model.layers"] == "layers"
    with torch.no_grad():
        for rows in ([[(4, 8)], [(4, 8)]], [[(4, 4)], [(4, 12)]], [[(4, 12), (4, 4)]], [[(8, 8)], [(4, 4)]]):
            batch = images(rows, 1)
            assert torch.equal(compiled(**batch).logits, model(**batch).logits), rows
