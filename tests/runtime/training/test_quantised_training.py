"""A training step on a quantised base keeps codes, and never the values computed from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from graftc.testing import families
from graftc.testing.compare import inputs_for
from tests.kit.comparing import gradients_of
from tests.kit.dense_twins import dense_twin
from tests.kit.models import fresh

TARGET = {"role": ["attn.q", "attn.o"]}
METHODS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"method": "lora", "rank": 4, "target": TARGET}],
    "dropout": [{"method": "lora", "rank": 4, "dropout": 0.1, "target": TARGET}],
    "dora": [{"method": "dora", "rank": 4, "target": TARGET}],
    "spiel": [{"method": "spiel", "density": 0.02, "target": TARGET}],
    "ag": [{"method": "spiel", "variant": "AG", "density": 0.02, "target": TARGET}],
    "lokr": [{"method": "lokr", "target": TARGET}],
    "houlsby": [{"method": "houlsby"}],
    "prefix": [{"method": "prefix"}],
}
OFF: tuple[list[str], ...] = ([], ["projections"], ["recompute"], ["projections", "recompute"])


def gradients(compiled: Any, run: Callable[..., Any] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a step, and the gradients of all trained tensors."""
    inputs = inputs_for(compiled, seed=1)
    torch.manual_seed(0)
    loss = (compiled if run is None else run)(**inputs)[0].square().mean()
    loss.backward()
    grads = gradients_of(compiled)
    compiled.zero_grad()
    return loss.detach(), grads


def weight_sizes(compiled: Any) -> set[int]:
    """Return the numbers of entries of the packed weights."""
    return {own.numel for own in compiled.compilation.store.packed.values()}


def kept(compiled: Any, run: Callable[..., Any]) -> list[Tensor]:
    """Return the tensors that autograd saves in the forward pass, except parameters and buffers."""
    saved: list[Tensor] = []
    own = {p.untyped_storage().data_ptr() for p in (*compiled.parameters(), *compiled.buffers())}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved.append(tensor)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return saved


@pytest.mark.full
@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize("off", OFF, ids=",".join)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "mixtral", "t5"])
def test_no_value_is_kept(family: str, off: list[str], name: str) -> None:
    """No more bytes are kept than by the plain model, whatever is turned off, and gradients are equal bit for bit."""
    model = getattr(families, family)().eval()
    twin = fresh(dense_twin(model, quantize="nf4"), *METHODS[name], optimise={"off": off}).train()
    compiled = fresh(model, *METHODS[name], base={"quantize": "nf4"}, optimise={"off": off}).train()
    (loss, ours), (other, theirs) = gradients(compiled), gradients(twin)
    assert loss == other and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    inputs = inputs_for(compiled, seed=1)
    packed, plain = compiled.activations(**inputs), twin.activations(**inputs)
    assert packed.kept <= plain.kept
    assert packed.without > plain.without + 4 * min(weight_sizes(compiled))


@pytest.mark.full
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend: str) -> None:
    """Under `torch.compile`, the step keeps codes as well, and gives the same gradients."""
    model = families.llama().eval()
    compiled = fresh(model, *METHODS["lora"], base={"quantize": "nf4"}).train()
    loss, wanted = gradients(compiled)
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    inputs = inputs_for(compiled, seed=1)
    run(**inputs)
    saved = kept(compiled, lambda: run(**inputs))
    assert saved and not [t.shape for t in saved if t.is_floating_point() and t.numel() in weight_sizes(compiled)]
    again, grads = gradients(compiled, run)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == wanted.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_checkpointed_layers() -> None:
    """If whole layers are recomputed, the gradients are the same."""
    model = families.llama().eval()
    _, wanted = gradients(fresh(model, *METHODS["lora"], base={"quantize": "int4"}).train())
    _, grads = gradients(fresh(model, *METHODS["lora"], base={"quantize": "int4"}, checkpoint="layers").train())
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


@pytest.mark.slow
def test_no_gradient_for_codes() -> None:
    """Parts are frozen integer parameters, and only tensors of the adaptation train."""
    compiled = fresh(families.gpt2().eval(), *METHODS["lora"], base={"quantize": "nf4", "double": True}).train()
    parts = [name for name in compiled.compilation.store.packed for name in compiled.compilation.store.parts_of(name)]
    parameters = dict(compiled.named_parameters())
    assert parts and all(parameters[name].dtype == torch.uint8 and not parameters[name].requires_grad for name in parts)
    assert all(".graftc." in name for name, p in parameters.items() if p.requires_grad)
