"""Layers whose Python decides by values of buffers and masks, and by whether numbers are finite.

Each branch that calls take gets its own graph.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graftc
from graftc.testing import perturb
from tests.kit.comparing import gradients_of
from tests.kit.models import fresh

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.{up,down}"}}]}
WIDTH = 6


class Layer(nn.Module):
    """A layer that keeps a range, handles full masks separately, and clamps numbers that are not finite.

    The range starts over while it is zero; `how` selects what else decides.
    """

    low: Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH), how
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = F.dropout(torch.relu(self.up(x)), 0.3, self.training)
        if self.how == "hidden" and h.sum() > 0:
            h = h * 2
        if self.how == "chance" and torch.rand(()) < 0.5:
            h = h * 2
        if self.training:
            self.calls.add_(1)
            least = h.data.min()
            if self.low == 0:
                self.low.add_(least)
            else:
                self.low.mul_(0.5).add_(0.5 * least)
        if not mask.all().item():
            h = h.masked_fill(~mask[..., None], 0.0) + self.low
        h = self.down(h)
        if torch.isinf(h).any() or torch.isnan(h).any():
            h = torch.nan_to_num(h).clamp(-10, 10)
        return x + h


class Stack(nn.Module):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(how) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def inputs(seed: int = 0, full: bool = True, broken: bool = False) -> dict[str, Tensor]:
    own = torch.Generator().manual_seed(seed)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = full
    x = torch.randn(2, 5, WIDTH, generator=own)
    x[0, 2, 1] = float("nan") if broken else 0.5
    return {"x": x, "mask": mask}


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal to the bit, with NaN in the same places."""
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan())


def same_buffers(compiled: Any, source: nn.Module) -> bool:
    """Return whether the buffers that a compiled model has updated equal those of the source."""
    own = dict(source.named_buffers())
    updated = {name: tensor for name, tensor in compiled.state_dict().items() if name in own}
    return bool(updated) and all(same(tensor, own[name]) for name, tensor in updated.items())


CALLS = [
    (mode, full, broken)
    for mode in (True, False)
    for full, broken in ((True, False), (True, False), (False, False), (False, True), (True, True), (False, False))
]


@pytest.mark.full
def test_calls_that_decide_otherwise_equal_the_source_with_its_buffers_and_random_numbers() -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    compiled = fresh(model, **SPEC, inputs=inputs(), cache=False)
    (stack,) = compiled.report.stacks
    assert (stack.stack, stack.level) == ("layers", "layers")
    source = copy.deepcopy(model)
    kinds = []
    for _ in range(3):
        for seed, (training, full, broken) in enumerate(CALLS):
            given, results, after = inputs(seed, full, broken), [], []
            for each in (source, compiled):
                each.train(training)
                torch.manual_seed(seed)
                results.append(each(**given))
                after.append(torch.rand(()))
            assert same(results[0], results[1]), (training, full, broken)
            assert torch.equal(after[0], after[1]) and same_buffers(compiled, source)
        kinds.append(len(compiled.compilation.signatures))
    assert kinds[1] == kinds[2] <= 8  # by then, a buffer contains NaN


@pytest.mark.full
def test_gradients_a_merge_and_an_artifact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack().eval()
    compiled = fresh(model, **SPEC, inputs=inputs(), cache=False)
    perturb(compiled, 0.3)
    compiled(**inputs(full=False))
    merged = compiled.merge()
    plain = copy.deepcopy(model)
    plain.load_state_dict(merged.folded_state_dict(), strict=False)
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", model).eval()
    for full, broken in ((True, False), (False, False), (False, True)):
        given = inputs(3, full, broken)
        wanted = compiled(**given)
        assert same(loaded(**given), wanted)
        for other in (merged, plain):
            torch.testing.assert_close(other(**given), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)
    compiled.zero_grad(), loaded.zero_grad()
    for full in (True, False):
        for each in (compiled, loaded):
            each(**inputs(4, full)).square().sum().backward()
    own = gradients_of(compiled)
    plain.requires_grad_(True)
    for full in (True, False):
        plain(**inputs(4, full)).square().sum().backward()
    for name, gradient in own.items():
        assert gradient is not None
        module, _, factor = name.partition(".graftc.")
        assert torch.equal(dict(loaded.named_parameters())[name].grad, gradient)
        if factor.endswith(".B"):
            a = dict(compiled.named_parameters())[f"{name.removesuffix('B')}A"]
            whole = dict(plain.named_parameters())[f"{module}.weight"].grad
            (lora,) = compiled.compilation.spec.adapt
            torch.testing.assert_close(gradient, lora.alpha / lora.rank * whole @ a.T, rtol=1e-4, atol=1e-4)


@pytest.mark.sample("chance")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["hidden", "chance"])
def test_what_varies_from_call_to_call_makes_no_graph_of_a_layer(how: str) -> None:
    torch.manual_seed(0)
    model = Stack(how).eval()
    compiled = fresh(model, **SPEC, inputs=inputs(), cache=False).eval()
    (stack,) = compiled.report.stacks
    assert stack.level == "modules" and "vary from call to call" in stack.reason
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = model(**inputs(seed))
        torch.manual_seed(seed)
        assert torch.equal(compiled(**inputs(seed)), wanted)


class Replaces(Layer):
    """A layer that replaces its buffer by new tensors, as modules of libraries do."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.training:
            self.low = torch.minimum(self.low, x.data.min()) if self.low < 0 else self.low + x.data.min()
        return x + self.down(torch.relu(self.up(x))) * mask[..., None]


@pytest.mark.full
def test_a_buffer_that_a_library_s_layer_replaces_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """I-BERT keeps the ranges of activations so; a user's own class is refused, as for any other attribute."""
    monkeypatch.setattr(Replaces, "__module__", "transformers.models.ibert")
    torch.manual_seed(0)
    model = Stack().eval()
    model.layers = nn.ModuleList(Replaces("") for _ in range(2))
    compiled = fresh(model, **SPEC, inputs=inputs(), cache=False)
    assert [stack.level for stack in compiled.report.stacks] == ["layers"]
    source = copy.deepcopy(model).train()
    compiled.train()
    for seed in range(3):
        assert torch.equal(source(**inputs(seed)), compiled(**inputs(seed)))
        assert same_buffers(compiled, source)
    assert len(compiled.compilation.signatures) == 2
    assert all(not layer.low and trained.low for layer, trained in zip(model.layers, source.layers, strict=True))
