"""OFT and BOFT compared with the installed peft in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.releases import needs
from tests.parity.support import MODULES, Case, Names, check_float64, globs, pair

LINEAR = [family for family in MODULES if family != "gpt2"]
"""Families without ``Conv1D``, which peft's OFT and BOFT do not support."""

OFT = Names({"Q": "oft_R.default.weight"})
OFT_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"block_size": 8}, {"oft_block_size": 8}),
    "blocks": ({"blocks": 4}, {"r": 4, "oft_block_size": 0}),
    "nearest": ({"block_size": 7, "nearest": True}, {"oft_block_size": 7}),
    "shared": ({"block_size": 8, "block_share": True}, {"oft_block_size": 8, "block_share": True}),
    "terms": ({"block_size": 8, "terms": 3}, {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "two terms": ({"block_size": 8, "terms": 2}, {"oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    "eight terms": ({"block_size": 8, "terms": 8}, {"oft_block_size": 8, "num_cayley_neumann_terms": 8}),
}


def oft(family: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Case:
    modules = MODULES[family]
    adaptation = {"method": "oft", "target": globs(modules), **ours}
    return Case(family, adaptation, lambda p: p.OFTConfig(target_modules=modules, **theirs), OFT, noise=0.05)


@pytest.mark.slow
@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", LINEAR)
def test_oft(family: str) -> None:
    check_float64(oft(family, *OFT_CASES["default"]))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("variant", [name for name in OFT_CASES if name != "default"])
def test_oft_variants(family: str, variant: str) -> None:
    check_float64(oft(family, *OFT_CASES[variant]))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("exact", [False, True])
def test_exact_transform_and_constraint(family: str, exact: bool) -> None:
    """Peft projects the tensors themselves in every forward pass, so before a further one they may exceed the bound.

    It computes the bound in float32, in which the root of 4 is exact.
    """
    ours = {"blocks": 4, "coft": True, "eps": 0.5, "cayley": "exact" if exact else "neumann"}
    theirs = {"r": 4, "oft_block_size": 0, "coft": True, "eps": 0.5, "use_cayley_neumann": not exact}
    models = pair(oft(family, ours, theirs), tiny(family).double())
    assert models.outputs() <= 1e-12
    assert models.gradients() <= 1e-12
    mine, inputs = dict(models.ours.named_parameters()), inputs_for(models.ours)
    optimisers = [
        torch.optim.AdamW(tensors, lr=1e-2)
        for tensors in ([mine[name] for name in models.tensors], models.tensors.values())
    ]
    models.ours.after_step()  # peft's tensors have been projected by now
    for _ in range(3):
        for model, optimiser in zip((models.ours, models.theirs), optimisers, strict=True):
            optimiser.zero_grad()
            model(**inputs)[0].square().sum().backward()
            optimiser.step()
        models.ours.after_step()
    assert models.outputs() <= 1e-12  # of peft's, this projects the tensors
    for name, tensor in models.tensors.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-12)
    assert models.merged() <= 1e-12


class Patches(nn.Module):
    """A convolution over several points, and one over single points."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.point = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return an image of 4 channels and half the size."""
        result: Tensor = self.point(torch.tanh(self.wide(x)))
        return result


@pytest.mark.slow
def test_convolutions(tmp_path: Path) -> None:
    """Before peft merges, it rotates patches, adds them up where they overlap, and convolves the sums; merged, it
    applies the rotated weight. Kernels of one point are the same in both libraries, and others are refused.
    """
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model, x = Patches().double().requires_grad_(False), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.OFTConfig(oft_block_size=6, target_modules=["wide"]))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "wide")
    before = theirs(x)
    assert float((theirs.merge_and_unload()(x) - before).abs().max()) > 0.1
    with pytest.raises(GraftError, match="OFT at wide is not a map of every patch") as error:
        graftc.import_peft(tmp_path / "wide", model, example_inputs=(x,))
    assert error.value.code == "GC112"
    with pytest.raises(GraftError, match="OFT at wide is not a map of every patch"):
        graftc.compile(peft.OFTConfig(oft_block_size=6, target_modules=["wide"]), model, example_inputs=(x,))
    for module, code in (("point", None), ("wide", "GC115")):
        entry = {"method": "oft", "block_size": 2, "target": {"modules": module}}
        ours = graftc.compile({"adapt": [entry]}, model, example_inputs=(x,)).eval()
        perturb(ours, 0.1)
        if code is not None:
            with pytest.raises(GraftError) as error:
                ours.export(tmp_path / f"{module} of ours", format="peft")
            assert error.value.code == code
            continue
        ours.export(tmp_path / f"{module} of ours", format="peft")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "point of ours").eval()
        assert float((loaded(x) - ours(x)).abs().max()) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("method", ["oft", "boft", "loha"])
def test_fused_layers_are_refused_where_peft_has_no_layer_for_them(method: str, tmp_path: Path) -> None:
    """Of these methods, peft has none for ``Conv1D``, so that nothing could load the folder."""
    ours = graftc.compile(
        {"adapt": [{"method": method, "target": {"modules": "**.mlp.c_fc"}, **SIZES[method]}]}, tiny("gpt2")
    )
    with pytest.raises(GraftError, match="Conv1D") as error:
        ours.export(tmp_path / "folder", format="peft")
    assert error.value.code == "GC115"


SIZES: dict[str, dict[str, int]] = {"oft": {"block_size": 8}, "boft": {}, "loha": {"rank": 2}}


@pytest.mark.slow
def test_a_config_as_a_spec() -> None:
    """A config becomes a spec with peft's sizes of blocks, also where its number does not divide a layer."""
    peft = pytest.importorskip("peft")
    config = peft.OFTConfig(oft_block_size=7, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False)
    ours = graftc.compile(config, tiny("llama"))
    theirs = peft.get_peft_model(tiny("llama"), config)
    sizes = sorted(tuple(t.shape) for t in ours.adapter_state_dict().values())
    assert sizes == sorted(tuple(p.shape) for p in theirs.parameters() if p.requires_grad)
    assert sizes == [(8, 15)] * 2 + [(10, 28)] * 2
    spec: Any = ours.spec.adapt[0]
    assert spec.method == "oft" and spec.nearest and spec.cayley == "exact"


class Blocks:
    """A stand-in for peft's CUDA extension, without which peft replaces several factors by one."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        """Return block-diagonal matrices of ``[factors, blocks, size, size]``."""
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad: Tensor, blocks: Tensor) -> list[Tensor]:
        """Return the blocks of ``[factors, width, width]``."""
        count, size = blocks.shape[1], blocks.shape[2]
        parts = [grad[:, i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(count)]
        return [torch.stack(parts, 1)]


BOFT = Names({"Q": "boft_R.default", "s": "boft_s.default"})
MERGED_IN_FLOAT32 = "earlier ones merge BOFT in float32 alone"

BOFT_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "two": ({"factors": 2}, {"boft_n_butterfly_factor": 2}),
    "three": ({"factors": 3, "block_size": 4}, {"boft_n_butterfly_factor": 3}),
    "blocks": ({"factors": 2, "blocks": 8}, {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 2}),
}


def boft(family: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Case:
    modules = MODULES[family]
    adaptation = {"method": "boft", "target": globs(modules), **ours}
    return Case(family, adaptation, lambda p: p.BOFTConfig(target_modules=modules, **theirs), BOFT, noise=0.05)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let peft use several factors."""
    layer = pytest.importorskip("peft.tuners.boft.layer")
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: Blocks)


@pytest.mark.slow
@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", LINEAR)
def test_boft(family: str, extension: None) -> None:
    needs("peft", "0.19", MERGED_IN_FLOAT32)
    check_float64(boft(family, *BOFT_CASES["two"]))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("variant", [name for name in BOFT_CASES if name != "two"])
def test_boft_variants(family: str, variant: str, extension: None) -> None:
    needs("peft", "0.19", MERGED_IN_FLOAT32)
    check_float64(boft(family, *BOFT_CASES[variant]))
