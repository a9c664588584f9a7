"""Gradients of whole base weights are also available for packed ones, as for a plain model of the same values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.capture.signature import Axis
from graftc.extend import BaseGradients
from graftc.testing import families
from graftc.testing.compare import inputs_for
from tests.kit.dense_twins import dense_twin

TARGET = {"role": ["attn.q", "attn.o"]}


class Tied(nn.Module):
    """A model of two layers that share a linear map, which each of them reads twice."""

    class Layer(nn.Module):
        """A layer with the shared map and one of its own."""

        def __init__(self, shared: nn.Linear) -> None:
            super().__init__()
            self.shared, self.own = shared, nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            """Apply both maps, the shared one twice."""
            return self.own(self.shared(self.shared(x).relu()).relu())

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(32, 32)
        self.layers = nn.ModuleList(self.Layer(shared) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        for layer in self.layers:
            x = layer(x)
        return x


def pair(model: nn.Module, adapt: list[dict[str, Any]], example: Any = None, **spec: Any) -> tuple[Any, Any]:
    """Return a quantised model and its plain twin, both compiled."""
    base = {"quantize": "nf4"}
    axes = None if example is None else [Axis("x", torch.float32, ("batch", 32))]
    compiled = []
    for source, own in ((model, {"base": base}), (dense_twin(model, axes, **base), {})):
        document = graftc.Spec.model_validate({"adapt": adapt, **own, **spec})
        compiled.append(graftc.compile(document, source, example))
    return compiled[0], compiled[1]


def wanted(compiled: Any, names: list[str], run: Any) -> list[tuple[str, Tensor]]:
    """Return the gradients of base weights in one pass, sorted by name."""
    received: list[tuple[str, Tensor]] = []
    gradients = BaseGradients(lambda name, gradient: received.append((name, gradient.clone())))
    gradients.want({name: compiled.compilation.store.get(name) for name in names})
    run(compiled)
    gradients.release()
    run(compiled)
    return sorted(received, key=lambda item: item[0])


@pytest.mark.slow
def test_shared_weights() -> None:
    """A weight with several uses gives one gradient in each pass, the sum, and none when it is released."""
    torch.manual_seed(0)
    x = torch.randn(3, 32)
    models = pair(Tied(), [{"method": "lora", "rank": 2, "target": {"modules": ["**.own"]}}], {"x": x})
    names = ["layers.0.shared.weight", "layers.1.own.weight"]
    ours, theirs = (wanted(each, names, lambda model: model(x=x).sum().backward()) for each in models)
    assert [name for name, _ in ours] == [name for name, _ in theirs] == names
    for (_, own), (_, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
@pytest.mark.parametrize("variant", ["AG", "MA"])
def test_spiel(family: str, variant: str) -> None:
    """The entries that SpIEL trains and replaces, and their values, are those of the twin."""
    model = getattr(families, family)().eval()
    adapt = {"method": "spiel", "variant": variant, "density": 0.02, "interval": 3, "accumulation_steps": 2}
    results = []
    for compiled in pair(model, [{**adapt, "target": TARGET}]):
        cls = graftc.optim.AgedAdamW if variant == "AG" else graftc.optim.SM3
        optimiser = cls(compiled, lr=0.01)
        inputs = inputs_for(compiled, seed=1)
        compiled.eval()
        compiled.train()
        compiled.begin(total_steps=8)
        for step in range(8):
            torch.manual_seed(step)
            compiled(**inputs)[0].square().mean().backward()
            optimiser.step()
            compiled.after_step()
            optimiser.zero_grad()
        results.append({n: t.detach().clone() for n, t in compiled.compilation.store.adapters()})
    ours, theirs = results
    assert ours.keys() == theirs.keys() and any(name.endswith("_indices") for name in ours)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-8)


@pytest.mark.full
@pytest.mark.sample("mask")
@pytest.mark.parametrize("method", ["mask", "child_tuning"])
def test_entries_by_examples(method: str) -> None:
    """Entries are chosen by gradients of the weights' values."""
    own = {"mask": {"selection": "fish", "density": 0.02}, "child_tuning": {"variant": "D", "reserve_p": 0.02}}[method]
    results = []
    for compiled in pair(families.bert().eval(), [{"method": method, **own, "target": TARGET}]):
        inputs = [inputs_for(compiled, seed=seed) for seed in range(3)]
        examples = [{**each, "labels": torch.arange(len(each["input_ids"])) % 3} for each in inputs]
        chosen = compiled.select(examples)
        results.append({n: t for n, t in chosen.compilation.store.adapters() if n.endswith("_indices")})
    assert results[0] and results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[1])


@pytest.mark.full
def test_copies() -> None:
    """A copy has parts of its own, and nothing collects their gradients."""
    (compiled, _) = pair(families.gpt2().eval(), [{"method": "spiel", "density": 0.02, "target": TARGET}])
    inputs = inputs_for(compiled, seed=1)
    compiled.train()
    compiled(**inputs)[0].sum().backward()
    copied = copy.deepcopy(compiled)
    store, other = compiled.compilation.store, copied.compilation.store
    name = next(iter(store.packed))
    part = store.parts_of(name)[0]
    assert store.get(part).data_ptr() != other.get(part).data_ptr()
    other.get(part).fill_(0)
    assert bool(store.get(name).abs().sum() > 0) and not torch.equal(store.get(name), other.get(name))
    copied(**inputs)[0].sum().backward()
