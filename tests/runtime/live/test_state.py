"""State that the Python between graphs keeps from call to call, none of which is the source's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.testing import perturb

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "inner"}}]}
SHORT, LONG = torch.randn(3, 6), torch.randn(9, 6)


class Keeping(nn.Module):
    """A model that is not a graph, because it counts its rows, and that keeps something from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.ones(1), persistent=False)
        self.longest = 4

    def forward(self, x: Tensor) -> Tensor:
        rows = int(torch.ones(x.shape[0]).sum().item())
        y: Tensor = self.inner(x)
        return self.keep(y, rows)

    def keep(self, y: Tensor, rows: int) -> Tensor:
        raise NotImplementedError


class Counting(Keeping):
    """A model that writes to a buffer in train mode, as a moving mean does."""

    def keep(self, y: Tensor, rows: int) -> Tensor:
        if self.training:
            self.calls.add_(1)
        return y + self.calls


class Replacing(Keeping):
    """A model that replaces a buffer and records this in an attribute, as dynamic rotary positions do."""

    def keep(self, y: Tensor, rows: int) -> Tensor:
        if rows > self.longest:
            self.register_buffer("scale", torch.full((1,), float(rows)), persistent=False)
            self.longest = rows
        return y * self.scale


class Clamping(Keeping):
    """A model that writes to a parameter."""

    def keep(self, y: Tensor, rows: int) -> Tensor:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.1, 0.1)
        return y


@pytest.mark.parametrize("cls", [Counting, Replacing])
@pytest.mark.parametrize("training", [True, False])
def test_it_keeps_what_the_source_keeps_and_the_source_nothing_of_it(cls: type[Keeping], training: bool) -> None:
    source = cls().train(training)
    reference, before = copy.deepcopy(source), copy.deepcopy(source.state_dict())
    compiled = graftc.compile(SPEC, source, (SHORT,), cache=False).train()
    reference.train()
    for x in (SHORT, LONG, LONG, SHORT):
        assert torch.equal(compiled(x), reference(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert torch.equal(source.scale, torch.ones(1)) and source.longest == 4


def test_a_buffer_that_is_written_to_is_saved_merged_and_copied(tmp_path: Path) -> None:
    source = Counting()
    compiled = graftc.compile(SPEC, source, (SHORT,), cache=False).train()
    perturb(compiled, 0.05)
    for _ in range(3):
        compiled(SHORT)
    compiled.eval()
    wanted = compiled(SHORT)
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", source)
    for other in (loaded.eval(), copy.deepcopy(compiled), compiled.merge()):
        assert torch.allclose(other(SHORT), wanted, atol=1e-6)
    assert float(compiled.state_dict()["calls"]) == 3 and float(source.calls) == 0
    assert torch.equal(loaded.train()(SHORT), compiled.train()(SHORT))


class Renewing(Keeping):
    """A model that replaces a buffer by a new tensor, as ``self.calls = self.calls + 1`` does."""

    def keep(self, y: Tensor, rows: int) -> Tensor:
        y = y + self.calls
        if self.training:
            self.calls = self.calls + 1
        return y * (1 + self.calls)


@pytest.mark.slow
def test_a_buffer_that_is_replaced_is_saved_merged_and_copied_and_the_base_has_its_own(tmp_path: Path) -> None:
    source, twin = Renewing().eval(), Renewing()
    twin.load_state_dict(source.state_dict())
    compiled = graftc.compile(SPEC, source, (SHORT,), cache=False)
    for _ in range(3):
        ours, theirs = compiled.train()(SHORT), twin.train()(SHORT)
        assert torch.equal(ours, theirs)
        ours.sum().backward()  # tensors saved by the graph of a call are not written to
    wanted = compiled.eval()(SHORT)
    assert torch.equal(wanted, twin.eval()(SHORT))
    assert float(compiled.state_dict()["calls"]) == float(compiled.calls) == 3 and float(source.calls) == 0
    with compiled.disabled():
        assert torch.equal(compiled(SHORT), source(SHORT))
        compiled.train()(SHORT)
        compiled.eval()
    assert torch.equal(compiled.reference()(SHORT), source(SHORT))
    assert torch.equal(compiled(SHORT), wanted)
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", source)
    for other in (loaded.eval(), copy.deepcopy(compiled), compiled.merge(allow_unchanged=True)):
        assert torch.allclose(other(SHORT), wanted, atol=1e-6)


def test_what_writes_to_a_parameter_is_refused_and_not_done() -> None:
    source = Clamping()
    before = source.inner.weight.clone()
    with pytest.raises(graftc.GraftError, match=r"writes to the parameter inner\.weight") as caught:
        graftc.compile({**SPEC, "capture": "layers"}, source, (SHORT,), cache=False)
    assert caught.value.code == "GC030"
    assert torch.equal(source.inner.weight, before)


class Bounding(Keeping):
    """A model that clamps a weight to bounds that it already meets, as Gemma 3n does in train mode."""

    def keep(self, y: Tensor, rows: int) -> Tensor:
        if self.training:
            self.inner.weight.data.clamp_(-100, 100)
        return y * rows


def test_writing_the_values_that_are_there_is_no_change() -> None:
    source = Bounding()
    before = source.inner.weight.clone()
    compiled = graftc.compile(SPEC, source, (SHORT,), cache=False).train()
    assert torch.equal(compiled(LONG), source(LONG))
    compiled(LONG).square().sum().backward()
    assert torch.equal(source.inner.weight, before)
    with torch.no_grad():
        source.inner.weight.mul_(1e6)
    with pytest.raises(graftc.GraftError, match=r"writes to the parameter inner\.weight"):
        graftc.compile(SPEC, source, (SHORT,), cache=False)


def test_in_inference_mode_too() -> None:
    source = Counting()
    compiled = graftc.compile(SPEC, source, (SHORT,), cache=False).train()
    with torch.inference_mode():
        compiled(SHORT)
        assert float(compiled.state_dict()["calls"]) == 1
    compiled(SHORT)
    assert float(compiled.state_dict()["calls"]) == 2 and float(source.calls) == 0
