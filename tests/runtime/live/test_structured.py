"""Inputs that are lists, tuples and dicts: the model's own Python unpacks them, between graphs of its layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.io import load_spec
from graftc.testing import perturb
from tests.runtime.live.models import forced_apart


class Detector(nn.Module):
    """A model that takes a list of images of any sizes and a dict of conditions, one of which may be missing."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))
        self.condition = nn.Linear(5, 8)

    def forward(
        self, images: list[Tensor], conditions: dict[str, Tensor | None], scale: float = 1.0
    ) -> list[dict[str, Tensor]]:
        """Return a mean for every image."""
        results = []
        for image in images:
            x = self.backbone(image[None]).mean((2, 3))
            for layer in self.layers:
                x = layer(x)
            if conditions["text"] is not None:
                x = x + self.condition(conditions["text"])
            results.append({"mean": scale * x[0]})
        return results


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_as_one_graph_it_is_refused() -> None:
    with pytest.raises(graftc.GraftError, match="GC030: Detector is called with a list, 'images'"):
        graftc.compile({**SPEC, "capture": "graph"}, Detector(), FIRST, cache=False)
    roles = graftc.roles(Detector(), FIRST, cache=False)  # the roles of its parts
    assert [finding.parameter for finding in roles.findings] == ["condition.weight"]


def test_what_is_no_container_is_refused() -> None:
    with pytest.raises(graftc.GraftError, match="GC031: input 'images' is a object, not a tensor"):
        graftc.compile(SPEC, Detector(), {**FIRST, "images": object()}, cache=False)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6))

    def forward(self, x: Tensor, images: Tensor | None, offset: float = 0.0) -> Tensor:
        return x + self.inner(x) + offset


class Across(Own):
    """A layer that reads images, and cannot be called without any."""

    def forward(self, x: Tensor, images: Tensor | None, offset: float = 0.0) -> Tensor:
        assert images is not None
        return x + self.inner(images.mean(1, keepdim=True)) + offset


class Once(Own):
    """A layer that may take no offset, although others of its class do."""

    def __init__(self, takes: bool) -> None:
        super().__init__()
        self.takes = takes

    def forward(self, x: Tensor, images: Tensor | None, offset: float = 0.0) -> Tensor:
        if offset and not self.takes:
            raise RuntimeError("no offset here")
        return super().forward(x, images, offset)


class Skipping(nn.Module):
    """Layers in one row and called alike, some of which a call leaves out."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, images: Tensor | None = None, offset: float = 0.0) -> Tensor:
        for layer in self.layers:
            if (images is None and isinstance(layer, Across)) or (offset and not getattr(layer, "takes", True)):
                continue
            x = layer(x, images, offset)
        return x


@pytest.mark.sample("of another class")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "other"),
    [([Own(), Across(), Own(), Across()], {}), ([Once(True), Once(False), Once(True)], {"offset": 0.5})],
    ids=["of another class", "of the same class"],
)
def test_layers_that_a_call_leaves_out_do_not_stop_the_others(layers: list[nn.Module], other: dict[str, Any]) -> None:
    model = Skipping(*layers).eval().requires_grad_(False)
    spec = load_spec({"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "layers.**"}}]})
    first = {"x": torch.randn(2, 4, 6), "images": torch.randn(2, 3, 6)}
    compiled = forced_apart(spec, model, first).eval()
    perturb(compiled, 0.1)
    for batch in (first, {"x": torch.randn(3, 5, 6), **other}, first):
        with compiled.disabled():
            assert torch.equal(compiled(**batch), model(**batch))
        assert not torch.equal(compiled(**batch), model(**batch))
