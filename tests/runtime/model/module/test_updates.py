"""Buffers that a graph updates belong to the compiled model: the source's never change, and updated ones are saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.ir.updates import updates
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "first"}}]}


class Around(nn.Module):
    """A module for inputs with channels, between two linear maps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, 4), inner, nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.inner(self.first(inputs).unsqueeze(-1).unsqueeze(-1) * torch.ones(2, 3)).mean((2, 3)))


class Flat(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states.flatten(2)).unflatten(2, (2, 3))


class Average(nn.Module):
    """A moving average, updated in place, through a view, by a copy, or with an ``out`` argument."""

    def __init__(self, how: str, persistent: bool = True) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("ema", torch.zeros(4), persistent=persistent)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, states: Tensor) -> Tensor:
        if self.training:
            new = states.detach().mean((0, 2, 3))
            if self.how == "in place":
                self.ema.mul_(0.9).add_(new, alpha=0.1)
            elif self.how == "view":
                self.ema[:2].lerp_(new[:2], 0.1)
            elif self.how == "copy":
                self.ema.copy_(0.9 * self.ema + 0.1 * new)
            else:
                torch.mul(self.ema + new, 0.5, out=self.ema)
            self.count += 1
        return states - self.ema[:, None, None]


def _spectral(old: bool) -> nn.Module:
    make: Any = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    return make(nn.Conv2d(4, 4, 1))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: Flat(nn.BatchNorm1d(4)),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d without gains": lambda: nn.BatchNorm2d(4, affine=False, momentum=0.3),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    **{f"average {how}": lambda how=how: Average(how) for how in ("in place", "view", "copy", "out")},
    "average that no file has": lambda: Average("in place", persistent=False),
}
NORMS = ["BatchNorm1d", "BatchNorm2d", "SyncBatchNorm", "InstanceNorm2d"]


def around(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Around(MODULES[name]()).train().requires_grad_(False)
    for _ in range(3):  # statistics that are not those of a new module
        model(torch.randn(5, 4) + 1)
    return model, graftc.compile(SPEC, model, (torch.randn(3, 4),), cache=False)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.named_buffers()}


def train(module: nn.Module) -> None:
    torch.manual_seed(1)
    for _ in range(3):
        module(torch.randn(6, 4) * 2 - 1)


@pytest.mark.full
@pytest.mark.parametrize("name", MODULES)
def test_updated_buffers_are_the_models_own(name: str, tmp_path: Path) -> None:
    model, compiled = around(name)
    declared = compiled.program("train").updates
    assert declared and not compiled.program("eval").updates and not updates(compiled.program("eval").graph)
    before, twin = tensors(model), copy.deepcopy(model)
    train(compiled.train())
    train(twin.train())
    after = tensors(twin)
    for buffer, value in tensors(model).items():
        assert torch.equal(value, before[buffer]), "the source's statistics moved"
    moved = {buffer for buffer in before if not torch.equal(before[buffer], after[buffer])}
    assert moved == declared
    for buffer in moved:
        torch.testing.assert_close(compiled.get_buffer(buffer), after[buffer])
    inputs = torch.randn(5, 4)
    compiled.eval(), twin.eval(), model.eval()
    torch.testing.assert_close(compiled(inputs), twin(inputs))
    assert declared <= compiled.adapter_state_dict().keys()

    perturb(compiled)
    path = compiled.save(tmp_path / "artifact")
    for base in (model, twin):  # one with the old statistics, and one with others
        loaded = graftc.load(path, base, cache=False).eval()
        assert torch.equal(loaded(inputs), compiled(inputs))
        for buffer in declared:
            assert torch.equal(loaded.get_buffer(buffer), compiled.get_buffer(buffer))
    copied = copy.deepcopy(compiled)
    train(copied.train())
    for buffer in declared:
        assert not torch.equal(copied.get_buffer(buffer), compiled.get_buffer(buffer))
        assert torch.equal(tensors(model)[buffer], before[buffer])
    merged = compiled.merge()
    folded = merged.folded_state_dict()
    train(compiled.train())
    torch.testing.assert_close(merged(inputs), loaded(inputs), atol=1e-5, rtol=0)
    for buffer in declared:
        assert torch.equal(folded[buffer], loaded.get_buffer(buffer))


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
def test_disabled_is_the_base_with_its_own_statistics(name: str) -> None:
    model, compiled = around(name)
    train(compiled.train())
    perturb(compiled)
    before, inputs = tensors(compiled), torch.randn(5, 4)
    for mode in (False, True):
        compiled.train(mode)
        with compiled.disabled():
            output = compiled(inputs)
        torch.testing.assert_close(output, copy.deepcopy(model).train(mode)(inputs))
        for buffer, value in tensors(compiled).items():
            assert torch.equal(value, before[buffer]), "a pass without adapters moved statistics"


@pytest.mark.slow
def test_another_base_is_still_another_base(tmp_path: Path) -> None:
    model, compiled = around("BatchNorm2d")
    path = compiled.save(tmp_path / "artifact")
    other = copy.deepcopy(model)
    other.inner.bias.add_(1)  # type: ignore[operator]
    with pytest.raises(GraftError, match=r"GC087.*inner.bias"):
        graftc.load(path, other, cache=False)


@pytest.mark.full
@pytest.mark.parametrize("old", [True, False])
def test_spectral_norm(old: bool) -> None:
    """Training a compiled model with spectral norm never changes the buffers of the source."""
    torch.manual_seed(0)
    model = Around(_spectral(old)).eval().requires_grad_(False)
    before = {n: t.clone() for n, t in model.named_buffers()}
    compiled = graftc.compile(SPEC, model, (torch.randn(3, 4),), cache=False)
    train(compiled.train())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
