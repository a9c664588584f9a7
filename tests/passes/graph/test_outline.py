"""Outlining: values that an adaptation computes from tensors alone belong to the only layer that reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.graph.outline import outline
from graftc.testing import largest_difference
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import floats


@pytest.mark.slow
@pytest.mark.sample("adalora-llama", "sora-gpt2", "dylora-bert", "lora-bert", "lora-llama")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", ["adalora", "sora", "dylora", "lora"])
def test_a_layer_is_one_block(family: str, method: str) -> None:
    """Gated and masked factors need no input, yet stay in their layer instead of before all layers; equal layers have
    equal code.
    """
    fields = {"target_rank": 2} if method == "adalora" else {}
    entry = {"method": method, "target": {"role": ["attn.q", "attn.o"]}, "rank": 4, **fields}
    compiled = graftc.compile({"adapt": [entry]}, tiny(family))
    for mode in ("train", "eval"):
        outlined = outline(compiled.program(mode))
        assert [block.use for block in outlined.blocks] == [0, 0]
        first, second = (block.graph.python_code("self").src for block in outlined.blocks)
        assert first == second
        inserted = sum(len(block.graph.find_nodes(op="get_attr")) for block in outlined.blocks)
        assert inserted >= len(compiled.report.adaptations) * 4


@pytest.mark.sample("off0")
@pytest.mark.slow
@pytest.mark.parametrize("off", [[], ["projections"]])
def test_random_numbers_are_drawn_in_the_order_of_the_source(off: list[str]) -> None:
    """T5 draws for its decoder's embeddings between two stacks, and the first one's result is read by every layer of
    the second.
    """
    model = tiny("t5")
    spec = {
        "adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.{q,k,v,o}", "ffn.{up,down}"]}}],
        "optimise": {"off": off},
    }
    compiled = graftc.compile(spec, model).train()
    inputs, outputs = inputs_for(compiled), []
    for own in (model.train(), compiled):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append(floats(own(**inputs)))
    assert largest_difference(*outputs) <= 1e-5


@pytest.mark.full
def test_what_writes_and_what_reads_it_keep_their_order() -> None:
    """T5 computes its decoder's tokens from labels by writing to one tensor, after its encoder."""
    model = tiny("t5").eval()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}
    compiled = graftc.compile(spec, model).eval()
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, 4:] = -100
    with torch.no_grad():
        for train in (False, True):
            torch.manual_seed(0)
            expected = model.train(train)(input_ids=ids, labels=labels).loss
            torch.manual_seed(0)
            torch.testing.assert_close(compiled.train(train)(input_ids=ids, labels=labels).loss, expected)


class Gathering(nn.Module):
    """Layers that write their results into one tensor, whose mean is taken after them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        gathered = x.new_zeros(3, *x.shape)
        for number, layer in enumerate(self.layers):
            x = layer(x).relu()
            gathered[number] = x
        result: Tensor = self.head(gathered.mean(0))
        return result


class Twice(nn.Module):
    """A layer that runs twice, with writes to its result in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.layers[0](x)
            x[:, 0] = 0
        result: Tensor = self.layers[1](x)
        return result


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "target"), [(Gathering, "head"), (Twice, "layers.*")])
def test_writes_between_layers(kind: type[nn.Module], target: str) -> None:
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(2, 8)
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": target}}]}
    compiled = graftc.compile(spec, model, {"x": x})
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(x), model(x))
