"""Adapted tensors that the model's own Python reads between graphs, in a later call than the example.

Reading values is refused, because the adaptation is in the graphs; code that reads no values runs.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from tests.kit.models import adapted


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.o(x).tanh()


class Model(nn.Module):
    """A model that is not a graph, and reads what `read` says besides its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(3)), nn.Linear(8, 3)

    def forward(self, x: Tensor, read: str | None = None) -> Tensor:
        own = self.layers[0].o
        for layer in self.layers:
            if x.sum().item() > 1e9:
                break
            if read == "weight":
                x = x @ own.weight.T
            if read == "data":
                x = x + own.weight.data[0]
            if read == "bias":
                x = x + own.bias
            if read == "in place":
                x = x.clone().add_(own.bias)
            if read == "held":
                own.weight.data.clamp_(-99, 99)
            if read == "listed":
                x = x + sum(p.sum() for p in self.layers[0].parameters())
            if read == "types":
                x = x.to(own.weight.dtype, copy=True).to(own.weight.device) * len(own.weight) + own.weight.size(1)
                x = x * next(self.parameters()).numel() * own.weight.is_floating_point() / sum(own.weight.shape)
            x = layer(x)
        return self.head(x)


def own_adapted(method: str, **spec: Any) -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Model().eval().requires_grad_(False), torch.randn(2, 8)
    entry = {"method": method, "name": "own", "target": {"modules": "layers.*.o"}}
    return adapted(model, entry, inputs={"x": x}, cache=False, noise=0.3, **spec), model, x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "refused", "base"),
    [
        ("lora", {"weight", "data", "bias", "in place", "listed"}, {}),
        ("lora", {"weight", "data", "bias", "in place", "listed"}, {"quantize": "int8"}),
        ("full", {"weight", "data", "bias", "in place", "listed"}, {}),
        ("bitfit", {"bias", "in place", "listed"}, {}),
    ],
)
def test_reading_values_is_refused_and_asking_for_types_is_not(
    method: str, refused: set[str], base: dict[str, Any]
) -> None:
    compiled, given, x = own_adapted(method, base=base)
    merged = compiled.merge(base="full") if base else compiled.merge()
    model = compiled.compilation.source
    plain = copy.deepcopy(given)
    plain.load_state_dict(merged.folded_state_dict())
    for read in (None, "types", "held", "weight", "data", "bias", "in place", "listed"):
        with compiled.disabled():
            assert torch.equal(compiled(x, read=read), model(x, read=read))
        torch.testing.assert_close(merged(x, read=read), plain(x, read=read))
        if read in refused:
            names = r"(weight|bias|weight_codes)"
            with pytest.raises(GraftError, match=rf"GC031.*layers\.0\.o\.{names} between graphs, but 'own'"):
                compiled(x, read=read)
        else:
            torch.testing.assert_close(compiled(x, read=read), plain(x, read=read))
    assert type(given.layers[0].o.weight) is nn.Parameter


@pytest.mark.slow
def test_the_example_reads_values_of_a_packed_weight_or_asks_for_its_type() -> None:
    entry = {"method": "lora", "rank": 2, "target": {"modules": "layers.*.o"}}
    compiled, _, x = own_adapted("lora", base={"quantize": "int8"})
    packed = compiled.compilation.source
    again = adapted(packed, entry, inputs={"x": x, "read": "types"}, cache=False)
    with again.disabled():
        assert torch.equal(again(x, read="types"), packed(x, read="types"))
    with pytest.raises(GraftError, match=r"GC149.*layers\.0\.o\.weight, which"):
        adapted(packed, entry, inputs={"x": x, "read": "weight"}, cache=False)


@pytest.mark.full
@pytest.mark.slow
def test_a_tensor_that_several_adapt_stays_guarded_while_one_does() -> None:
    torch.manual_seed(0)
    model, x = Model().eval().requires_grad_(False), torch.randn(2, 8)
    target = {"modules": "layers.*.o"}
    adapt = [{"method": "lora", "name": name, "rank": 2, "target": target} for name in ("first", "second")]
    compiled = graftc.compile({"adapt": adapt}, model, {"x": x}, cache=False).eval()
    perturb(compiled, 0.3)
    for left_out, other in (("first", "second"), ("second", "first")):
        with compiled.disabled(left_out), pytest.raises(GraftError, match=rf"GC031.*'{other}' adapts it"):
            compiled(x, read="weight")
    with compiled.disabled("first", "second"):
        assert torch.equal(compiled(x, read="weight"), model(x, read="weight"))


@pytest.mark.slow
def test_threads_that_run_the_base_and_the_adapted_model() -> None:
    compiled, model, x = own_adapted("lora")
    reference, told = compiled.reference(), []

    def run(base: bool) -> None:
        for _ in range(20):
            try:
                given = (reference if base else compiled)(x, read="weight")
                told.append(base and torch.equal(given, model(x, read="weight")))
            except GraftError as error:
                told.append(not base and error.code == "GC031")

    threads = [threading.Thread(target=run, args=(base,)) for base in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == [True] * 80
