"""C3A compared with the installed peft: outputs, gradients, steps and merged outputs.

Peft computes it in float32 on any base, so its layers are run with float64 in place of that type. The gradient that its
operator returns for the input is wrong, so gradients and steps are compared with those of the matrix that it merges.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.model.runner import runner_of
from graftc.testing.families import tiny
from tests.kit.comparing import every_tensor
from tests.parity.support import MODULES, Case, Names, check_float64, check_nothing_is_written, globs, pair

C3A = Names({"kernel": "c3a_kernel.default"})
LINEAR = [family for family in MODULES if family != "gpt2"]
"""Families without ``Conv1D``, which peft's C3A does not support."""


class Wide:
    """The names of torch, with float64 as ``float32``."""

    def __getattr__(self, name: str) -> Any:
        return torch.float64 if name == "float32" else getattr(torch, name)


class ByMatrix:
    """Peft's product with the matrix that it merges, whose gradient torch computes."""

    @staticmethod
    def apply(x: Tensor, kernel: Tensor) -> Tensor:
        """Return the product."""
        from peft.tuners.c3a.utils import get_circulant_fast

        product: Tensor = x @ get_circulant_fast(kernel).T
        return product


@pytest.mark.slow
@pytest.mark.sample("4-llama")
@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("size", [4, 8])
def test_layers(size: int, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = pytest.importorskip("peft.tuners.c3a.layer")
    monkeypatch.setattr(layer, "torch", Wide())
    monkeypatch.setattr(layer, "BlockCircularConvolution", ByMatrix)
    modules = MODULES[family]
    adaptation = {"method": "c3a", "target": globs(modules), "block_size": size}
    fields = {"block_size": size, "target_modules": modules}
    check_float64(Case(family, adaptation, lambda p: p.C3AConfig(**fields), C3A, noise=4.0))


@pytest.mark.full
@pytest.mark.parametrize("family", LINEAR)
def test_outputs_are_those_of_pefts_operator(family: str) -> None:
    """Its operator, in float32, agrees as well, until something is trained with it."""
    modules = MODULES[family]
    adaptation = {"method": "c3a", "target": globs(modules), "block_size": 8}
    fields = {"block_size": 8, "target_modules": modules}
    models = pair(Case(family, adaptation, lambda p: p.C3AConfig(**fields), C3A, noise=4.0), tiny(family).double())
    assert models.outputs() <= 1e-5 and models.merged() <= 1e-5


@pytest.mark.slow
def test_pefts_gradient_of_the_input_is_not_that_of_its_product() -> None:
    """Peft correlates where it has to convolve; the gradients of kernels are right, those of layers below are not."""
    utils = pytest.importorskip("peft.tuners.c3a.utils")
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 8), (3, 2, 4), (5, 12))
    x, kernel, grad = (torch.randn(*size, dtype=torch.float64, generator=generator) for size in sizes)
    leaves = x.requires_grad_(), kernel.requires_grad_()
    theirs = torch.autograd.grad(utils.BlockCircularConvolution.apply(*leaves), leaves, grad)
    right = torch.autograd.grad(ByMatrix.apply(*leaves), leaves, grad)
    ours = torch.autograd.grad(torch.ops.graftc.circulant_product(*leaves), leaves, grad)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    torch.testing.assert_close(theirs[1], right[1], rtol=0, atol=1e-13)
    assert float((theirs[0] - right[0]).norm() / right[0].norm()) > 0.1


@pytest.mark.full
@pytest.mark.parametrize("start", [True, False, "xavier_uniform", "kaiming_uniform", "gaussian"])
def test_a_config_starts_as_in_peft(start: bool | str) -> None:
    """A config becomes a spec with its block sizes, whose kernels have peft's distribution."""
    peft = pytest.importorskip("peft")
    sizes = {"block_size": 256, "block_size_pattern": {"q_proj": 24, "down_proj": 8}}
    config = peft.C3AConfig(target_modules=["q_proj", "down_proj"], init_weights=start, **sizes)
    drawn: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor]]] = {}
    for seed in range(20):
        compiled = graftc.compile(config, tiny("llama"), seed=seed)
        torch.manual_seed(seed)
        theirs = every_tensor(peft.get_peft_model(copy.deepcopy(tiny("llama")), config))
        for name, tensor in compiled.adapter_state_dict().items():
            both = drawn.setdefault(tuple(tensor.shape), ([], []))
            both[0].append(tensor)
            both[1].append(theirs[C3A.of(name)].detach())
    assert set(drawn) == {(2, 2, 24), (6, 10, 8)}
    for one, two in drawn.values():
        a, b = torch.stack(one), torch.stack(two)
        assert bool(a.any()) == bool(b.any()) == (start is not True)
        if a.any():
            assert float(a.std() / b.std()) == pytest.approx(1, abs=0.05)
            spread = [float(t.abs().max() / t.std()) for t in (a, b)]
            assert (spread[0] < 2) == (spread[1] < 2) == (start != "gaussian")


@pytest.mark.slow
def test_an_initialisation_that_is_not_said_is_pefts() -> None:
    """A config as data, without the field, starts as peft does."""
    config = {"peft_type": "C3A", "block_size": 8, "target_modules": ["q_proj"]}
    (spec,) = runner_of(graftc.compile(config, tiny("llama", layers=1))).spec.adapt
    assert (spec.method, spec.block_size, spec.init) == ("c3a", 8, "xavier")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["c3a", "loha"])
def test_transposed_weights_are_refused(method: str, tmp_path: Path) -> None:
    """Peft has neither for ``Conv1D``, so nothing is written."""
    sizes: dict[str, Any] = {"block_size": 8} if method == "c3a" else {"rank": 2}
    entry = {"method": method, "target": {"modules": "**.c_attn"}, **sizes}
    compiled = graftc.compile({"adapt": [entry]}, tiny("gpt2", layers=1))
    check_nothing_is_written(compiled, tmp_path, "a Conv1D")


@pytest.mark.slow
def test_convolutions_are_refused(tmp_path: Path) -> None:
    """Peft has C3A for linear layers only, so nothing is written."""
    model, x = nn.Sequential(nn.Conv1d(4, 6, 2)), torch.randn(2, 4, 7)
    spec = {"adapt": [{"method": "c3a", "block_size": 2, "target": {"modules": "0"}}]}
    compiled = graftc.compile(spec, model, {"input": x})
    check_nothing_is_written(compiled, tmp_path, "a Conv1d")
