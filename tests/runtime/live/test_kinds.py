"""Elements that are called alike are traced once, and each still computes what its module computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc import load_spec
from graftc.compiler.capture import capture
from graftc.compiler.live import kinds
from graftc.passes.core.ir.functions import calls
from graftc.testing import families
from tests.runtime.live.models import forced_apart

SPEC = load_spec({"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.q*"}}]})


class Numbered(nn.Module):
    """A layer that may compute something else from its number."""

    def __init__(self, number: int, reads: bool) -> None:
        super().__init__()
        self.q, self.number, self.reads = nn.Linear(4, 6), number, reads
        self.down = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.q(x))) * (self.number if self.reads else 2)


class Stack(nn.Module):
    def __init__(self, count: int, reads: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Numbered(number, reads) for number in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list to which every trace of an element is added."""
    seen: list[Any] = []
    plain = capture._export
    monkeypatch.setattr(capture, "_export", lambda *args: (seen.append(args), plain(*args))[1])
    return seen


@pytest.mark.slow
def test_the_number_of_traces_does_not_depend_on_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for depth in (4, 12):
        model, batch = families.llama(num_hidden_layers=depth).eval(), {"input_ids": torch.randint(3, 90, (2, 5))}
        with monkeypatch.context() as patches:
            seen = traces(patches)
            compiled = forced_apart(SPEC, model, batch)
            with torch.no_grad():
                assert torch.equal(compiled(**batch).logits, model(**batch).logits)
                compiled.eval().generate(**batch, max_new_tokens=3, do_sample=False)
            counts.append(len(seen))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("reads", "shared"), [(False, 2), (True, 0)])
def test_only_layers_whose_numbers_do_not_matter_share_a_trace(reads: bool, shared: int) -> None:
    model, x = Stack(3, reads), torch.randn(2, 4)
    compiled = forced_apart(SPEC, model, {"x": x})
    assert len(calls(compiled.compilation.main.captures[0].traced.graph)) == shared
    assert torch.equal(compiled(x=x), model(x))


def test_an_element_alone_has_no_other_modules() -> None:
    model = families.llama(num_hidden_layers=3)
    only = kinds.alone(model, "model.layers.1.self_attn.q_proj")
    assert [name for name, _ in only.named_parameters()] == ["model.layers.1.self_attn.q_proj.weight"]
    assert only.get_submodule("model.layers.1.self_attn.q_proj") is model.model.layers[1].self_attn.q_proj
