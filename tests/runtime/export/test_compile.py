"""``torch.compile`` gives one graph and does not recompile for batch sizes of 2 and more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import graftc
from graftc.testing import perturb
from graftc.testing.deployment import check_compile
from graftc.testing.families import tiny


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", pytest.param("llama", marks=pytest.mark.full)])
def test_folded_model(family: str) -> None:
    """The folded model compiles like the adapted one, which the contract of LoRA's deployment checks."""
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "rank": 4}]}
    compiled = graftc.compile(spec, tiny(family)).eval()
    perturb(compiled)
    check_compile(compiled.merge(), backend="aot_eager")


@pytest.mark.slow
def test_the_check_notices_a_recompilation() -> None:
    """A model that depends on its batch size would be caught."""

    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x) * (2 if x.shape[0] == 2 else 3)

    whole = torch.compile(Counting(), fullgraph=True, dynamic=True, backend="eager")
    whole(torch.randn(2, 4))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(Exception, match=r"[Rr]ecompil"):
        whole(torch.randn(3, 4))
    torch._dynamo.reset()


class TestLayers:
    """Layers compiled one by one."""

    def counted(self, depth: int, *, checkpointing: bool = False) -> int:
        """Return the number of graphs compiled for inputs of several sizes, and check losses and gradients."""
        torch.manual_seed(0)
        lora = {"method": "lora", "target": {"role": ["attn.q", "ffn.down"]}, "rank": 4, "dropout": 0.1}
        compiled = graftc.compile({"adapt": [lora]}, tiny("llama", num_hidden_layers=depth))
        perturb(compiled)
        if checkpointing:
            compiled.gradient_checkpointing_enable()
        calls = [torch.randint(5, 50, size) for size in ((2, 9), (3, 12), (4, 7))]
        before = [self.step(compiled, ids) for ids in calls]
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled.compile_layers(backend=counter)
        for ids, (loss, gradients) in zip(calls, before, strict=True):
            results = self.step(compiled, ids)
            torch.testing.assert_close(results, (loss, gradients), rtol=1e-5, atol=1e-7)
        assert set(copy.deepcopy(compiled).state_dict()) == set(compiled.state_dict())
        torch._dynamo.reset()
        return int(counter.frame_count)

    def step(self, compiled: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(1)
        compiled.train().zero_grad()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in compiled.parameters() if p.requires_grad]

    @pytest.mark.full
    def test_a_deep_model_compiles_as_much_as_a_shallow_one(self) -> None:
        assert self.counted(2) == self.counted(5) <= 4  # the first layer's input has no gradient; sizes vary

    @pytest.mark.full
    def test_checkpointing(self) -> None:
        assert self.counted(3, checkpointing=True) <= 4

    @pytest.mark.slow
    def test_a_model_without_repeated_layers_is_compiled_as_a_whole(self) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        spec = {"adapt": [{"method": "lora", "target": {"modules": "0"}, "rank": 2}]}
        compiled = graftc.compile(spec, model, {"input": torch.zeros(2, 4)})
        counter = CompileCounterWithBackend("eager")
        compiled.compile_layers(backend=counter)
        compiled(torch.randn(3, 4))
        assert counter.frame_count > 0
        torch._dynamo.reset()
