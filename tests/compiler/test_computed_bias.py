"""Maps with a bias computed from several tensors, as BEiT, EVA-02 and Swin v2 join those of queries and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graftc
from graftc.compiler.folding.fold_plan import fold_plan
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb

WIDTH, HEADS = 12, 3


class Attention(nn.Module):
    def __init__(self, learnt: bool = True) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("k_bias", torch.zeros(WIDTH))
        self.learnt = learnt

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        if not self.learnt:
            bias = bias * x.mean()
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return x + self.proj(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, learnt: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention(learnt) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compiled_with(method: str, model: nn.Module | None = None, **target: Any) -> Any:
    torch.manual_seed(0)
    spec = {"adapt": [{"method": method, "name": "own", "target": target or {"role": "attn.{q,v}"}}]}
    return graftc.compile(spec, (model or Model()).eval(), {"x": torch.randn(2, 5, WIDTH)}, cache=False)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "full"])
def test_rows_of_the_weight_are_adapted_and_fold(method: str) -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 7, WIDTH)
    compiled = compiled_with(method, model).eval()
    assert {str(site.key.module) for site, _ in compiled.compilation.main.resolved[0].places} == {
        "blocks.0.qkv",
        "blocks.1.qkv",
    }
    assert torch.equal(compiled(x), model(x))
    perturb(compiled, 0.3)
    moved = compiled(x)
    assert (moved - model(x)).abs().max() > 1e-2
    merged = compiled.merge()
    assert merged.certificate.passed
    torch.testing.assert_close(merged(x), moved, atol=2e-6, rtol=1e-5)
    plain = Model().eval()
    plain.load_state_dict({**model.state_dict(), **merged.folded_state_dict()})
    torch.testing.assert_close(plain(x), moved, atol=2e-6, rtol=1e-5)
    assert torch.equal(plain.blocks[0].qkv.weight[WIDTH : 2 * WIDTH], model.blocks[0].qkv.weight[WIDTH : 2 * WIDTH])


@pytest.mark.parametrize("modules", ["**", "blocks.*"])
def test_what_the_bias_is_computed_from_trains_with_the_weight(modules: str) -> None:
    model, x = Model().eval(), torch.randn(3, 7, WIDTH)
    compiled = compiled_with("full", model, modules=modules).eval()
    perturb(compiled, 0.3)
    merged = compiled.merge()
    torch.testing.assert_close(merged(x), compiled(x), atol=2e-6, rtol=1e-5)
    assert not torch.equal(merged.folded_state_dict()["blocks.0.q_bias"], model.blocks[0].q_bias)


class OtherRows(nn.Module):
    """A model that adds the bias of rows that it does not multiply by."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.part.weight[:4], self.part.bias[4:])


def test_the_bias_of_other_rows_is_left_alone() -> None:
    torch.manual_seed(0)
    model, x = OtherRows().eval(), torch.randn(3, WIDTH)
    compiled = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "part**"}}]}, model, {"x": x}, cache=False
    ).eval()
    perturb(compiled, 0.3)
    folded = compiled.merge().folded_state_dict()
    assert torch.equal(folded["part.bias"], model.part.bias)
    torch.testing.assert_close(F.linear(x, folded["part.weight"][:4], model.part.bias[4:]), compiled(x))
    assert torch.equal(folded["part.weight"][4:], model.part.weight[4:])


def test_what_would_change_the_bias_stays() -> None:
    example = {"x": torch.randn(2, 5, WIDTH)}
    adapt = [
        {"method": "lora", "target": {"modules": "blocks.*.proj"}},
        {"method": "ia3", "target": {"modules": "blocks.*.qkv"}},
    ]
    compiled = graftc.compile({"adapt": adapt}, Model().eval(), example, cache=False).eval()
    perturb(compiled, 0.3)
    with pytest.raises(GraftError, match=r"GC050.*it changes the bias, which the model computes"):
        compiled.merge()
    plan = fold_plan(compiled.compilation)
    assert plan.names == ("lora",) and list(plan.reasons()) == ["ia3"]


def test_a_bias_that_depends_on_inputs_is_no_map() -> None:
    with pytest.raises(GraftError, match="GC017"):
        compiled_with("lora", Model(learnt=False), modules="blocks.*.qkv")


@pytest.mark.slow
def test_peft_which_would_not_apply_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=r"GC115.*blocks\.0\.qkv, whose weight the model reads without calling"):
        compiled_with("lora", modules="blocks.*.qkv").export(tmp_path / "adapter", "peft")
    compiled_with("lora", modules="blocks.*.proj").export(tmp_path / "adapter", "peft")
