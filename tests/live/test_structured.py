"""Inputs that are lists, tuples and dicts: the model's own Python takes them apart, between graphs of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb


class Detector(nn.Module):
    """Takes images of any sizes in a list, and conditions in a dict, of which one may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.condition = nn.Linear(5, 8)

    def forward(
        self, images: list[Tensor], conditions: dict[str, Tensor | None], scale: float = 1.0
    ) -> list[dict[str, Tensor]]:
        """A mean for every image."""
        found = []
        for image in images:
            x = self.backbone(image[None]).mean((2, 3))
            for layer in self.layers:
                x = layer(x)
            if conditions["text"] is not None:
                x = x + self.condition(conditions["text"])
            found.append({"mean": scale * x[0]})
        return found


SPEC: dict[str, Any] = {
    "adapt": [{"method": "lora", "rank": 2, "target": {"modules": "{backbone,condition,layers.**}"}}]
}
FIRST: dict[str, Any] = {
    "images": [torch.randn(3, 8, 9), torch.randn(3, 7, 5)],
    "conditions": {"text": torch.randn(1, 5)},
}
OTHERS: list[dict[str, Any]] = [
    {"images": [torch.randn(3, 4, 6)], "conditions": {"text": None}, "scale": 2.0},
    {"images": [torch.randn(3, 1, 1) for _ in range(3)], "conditions": {"text": torch.randn(1, 5)}},
    {"images": [], "conditions": {"text": None}},
]


def means(outputs: list[dict[str, Tensor]]) -> list[Tensor]:
    return [each["mean"] for each in outputs]


def test_it_is_the_source_merges_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Detector().eval()
    compiled = graftc.compile(SPEC, model, FIRST, cache=False).eval()
    for call in (FIRST, *OTHERS):
        assert all(map(torch.equal, means(compiled(**call)), means(model(**call))))
    perturb(compiled, 0.1)
    compiled.save(tmp_path / "artifact")
    merged, loaded = compiled.merge(), graftc.load(tmp_path / "artifact", model).eval()
    for call in (FIRST, *OTHERS):
        wanted = means(compiled(**call))
        assert all(map(torch.equal, means(loaded(**call)), wanted))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(means(merged(**call)), wanted, strict=True))
    sum(mean.square().sum() for mean in means(compiled.train()(**FIRST))).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)


def test_as_one_graph_it_is_refused() -> None:
    with pytest.raises(graftc.GraftError, match="GC030: Detector is called with a list, 'images'"):
        graftc.compile({**SPEC, "capture": "graph"}, Detector(), FIRST, cache=False)
    with pytest.raises(graftc.GraftError, match="GC030: Detector is called with a list, 'images'"):
        graftc.roles(Detector(), FIRST, cache=False)


def test_what_is_no_container_is_refused() -> None:
    with pytest.raises(graftc.GraftError, match="GC031: input 'images' is a object, not a tensor"):
        graftc.compile(SPEC, Detector(), {**FIRST, "images": object()}, cache=False)
