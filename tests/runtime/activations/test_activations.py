"""Training steps keep less for the backward pass, and their gradients are unchanged."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import graftc
from benchmarks.train.measure import peak_bytes
from graftc.runtime.activations import minimum_cut
from graftc.runtime.activations.training_code import TrainingCode, choices_of
from graftc.testing import tiny
from graftc.testing.compare import inputs_for
from graftc.testing.families import FAMILIES
from tests.kit.comparing import floats, gradients_of, same_tensors
from tests.kit.language_models import language_model
from tests.kit.models import adapted

ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"]
LORA: dict[str, Any] = {"method": "lora", "rank": 2, "dropout": 0.2}
PLAIN = {"optimise": {"off": ["recompute"]}}
Gradients = dict[str, Tensor]


def trained_copy(base: Any, change: dict[str, Any] | None = None, /, **spec: Any) -> Any:
    """Return a copy of a model with LoRA on all of its maps, in train mode."""
    config: Any = base.config
    roles = [*ROLES[:4], "experts"] if hasattr(config, "num_local_experts") else ROLES
    entry = {**LORA, **(change or {}), "target": {"role": roles}}
    return adapted(copy.deepcopy(base), entry, seed=0, **spec).train()


def loss_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(3)
    return torch.stack([leaf.square().mean() for leaf in floats(model(**inputs))]).sum()


def gradients(model: Any, inputs: dict[str, Any], run: Callable[..., Tensor] = loss_of) -> Gradients:
    model.zero_grad()
    run(model, inputs).backward()
    return gradients_of(model)


def saved(model: Any, inputs: dict[str, Any], run: Callable[..., Tensor] = loss_of) -> int:
    """Return the bytes kept alive for the backward pass by the forward pass, without tensors of the model."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()

    def pack(tensor: Tensor) -> Held:
        kept = Held(tensor)
        alive.add(kept)
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = run(model, inputs)
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    sizes = {h.tensor.untyped_storage()._cdata: h.tensor.untyped_storage().nbytes() for h in alive}
    del loss
    return sum(size for address, size in sizes.items() if address not in own)


def equal(one: Gradients, other: Gradients) -> bool:
    return bool(one) and same_tensors(one, other)


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny("llama").double().train()


@pytest.fixture(scope="module")
def usual(base: Any) -> Any:
    """A model with the default options."""
    return trained_copy(base)


@pytest.fixture(scope="module")
def inputs(usual: Any) -> dict[str, Any]:
    return inputs_for(usual)


@pytest.fixture(scope="module")
def expected(base: Any, inputs: dict[str, Any]) -> Gradients:
    """The gradients of plain autograd, which keeps all that it saves."""
    return gradients(trained_copy(base, **PLAIN), inputs)


@pytest.mark.full
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_gradients_are_the_same_to_the_bit_and_less_is_kept(family: str) -> None:
    torch.manual_seed(0)
    base = (language_model(family) if family not in FAMILIES else tiny(family)).double().train()
    ours, plain = trained_copy(base), trained_copy(base, **PLAIN)
    inputs = inputs_for(ours, front=False)
    assert equal(gradients(ours, inputs), gradients(plain, inputs))
    assert saved(ours, inputs) < saved(plain, inputs)


@pytest.mark.full
@pytest.mark.parametrize("budget", [0.3])
@pytest.mark.parametrize("family", ["gpt2", "mixtral", "t5"])
def test_a_budget_is_kept_within(family: str, budget: float) -> None:
    torch.manual_seed(0)
    base = tiny(family).double().train()
    ours, plain = trained_copy(base, memory={"budget": budget}), trained_copy(base, **PLAIN)
    inputs = inputs_for(ours, (6, 20))
    for name, expected in gradients(plain, inputs).items():
        torch.testing.assert_close(dict(gradients(ours, inputs))[name], expected, rtol=1e-10, atol=1e-14)
    # Draws of the base's own dropouts, and values that the loss reads, cannot be recomputed.
    least = trained_copy(base, memory={"budget": 1e-9})
    gradients(least, inputs)
    assert saved(ours, inputs) <= max(1.05 * budget * saved(plain, inputs), saved(least, inputs))


@pytest.mark.full
def test_less_budget_keeps_less(base: Any, inputs: dict[str, Any]) -> None:
    kept = []
    for budget in (0.9, 0.6, 0.4, 0.2):
        model = trained_copy(base, memory={"budget": budget})
        gradients(model, inputs)
        kept.append(saved(model, inputs))
    assert kept == sorted(kept, reverse=True) and kept[-1] < 0.6 * kept[0]


@pytest.mark.full
def test_predicted_bytes_are_those_that_are_kept(usual: Any, inputs: dict[str, Any]) -> None:
    gradients(usual, inputs)
    modules = (usual, *usual.blocks.values())
    predicted = sum(choice.kept for module in modules for choice in choices_of(module).values())
    measured = saved(usual, inputs, lambda model, given: model(**given).logits.sum())
    assert measured == pytest.approx(predicted, rel=0.05)


@pytest.mark.full
@pytest.mark.parametrize("document", [{}, {"memory": {"budget": 0.4}}, {"checkpoint": "layers"}, PLAIN])
def test_a_step_is_told_before_it_runs(base: Any, document: dict[str, Any]) -> None:
    """The predicted bytes are those of torch's allocator, and the prediction leaves the model unchanged."""
    model = trained_copy(base, **document)
    inputs = {"input_ids": torch.arange(8 * 64).reshape(8, 64) % 101}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    model.activations(input_ids=torch.ones(2, 3).long())  # a prediction for other sizes has no effect here
    told = model.activations(**inputs)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())

    def step() -> None:
        torch.autograd.backward(model(**inputs).logits.sum())

    step()
    model.zero_grad()
    assert told.peak == pytest.approx(peak_bytes(step), rel=0.05)
    kept = saved(model, inputs, lambda m, given: m(**given).logits.sum())
    assert told.kept == pytest.approx(kept, rel=0.1)
    assert f"kept {told.kept / 1e6:.1f} MB" in str(told) and told.to_json()["peak"] == told.peak


@contextmanager
def kept_by_the_host() -> Iterator[None]:
    with save_on_cpu():
        yield


@pytest.mark.slow
def test_under_the_hooks_of_others(usual: Any, inputs: dict[str, Any], expected: Gradients) -> None:
    def recomputed(model: Any, given: dict[str, Any]) -> Tensor:
        loss: Tensor = checkpoint(loss_of, model, given, use_reentrant=False)
        return loss

    assert equal(gradients(usual, inputs, recomputed), expected)
    with kept_by_the_host():
        assert equal(gradients(usual, inputs), expected)


@pytest.mark.slow
def test_backward_twice(usual: Any, inputs: dict[str, Any], expected: Gradients) -> None:
    def twice(model: Any, given: dict[str, Any]) -> Tensor:
        loss = loss_of(model, given)
        loss.backward(retain_graph=True)
        model.zero_grad()
        return loss

    assert equal(gradients(usual, inputs, twice), expected)


def test_two_forward_passes_before_a_backward_pass(usual: Any, inputs: dict[str, Any], expected: Gradients) -> None:
    def both(model: Any, given: dict[str, Any]) -> Tensor:
        return (loss_of(model, given) + loss_of(model, given)) / 2

    result = gradients(usual, inputs, both)
    for name, gradient in expected.items():
        torch.testing.assert_close(result[name], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_gradients_of_gradients(base: Any, usual: Any, inputs: dict[str, Any]) -> None:
    def second(model: Any) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        with sdpa_kernel(SDPBackend.MATH):
            first = torch.autograd.grad(loss_of(model, inputs), parameters, create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))  # type: ignore[arg-type]

    for ours, plain in zip(second(usual), second(trained_copy(base, **PLAIN)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_a_change_before_the_backward_pass_is_an_error(base: Any, inputs: dict[str, Any]) -> None:
    model = trained_copy(base, train=["**.input_layernorm"])
    gradients(model, inputs)
    loss = loss_of(model, inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "input_layernorm" in name:
                parameter += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.full
@pytest.mark.parametrize("memory", [{}, {"budget": 0.2}])
def test_parameters_are_those_of_the_forward_pass(base: Any, inputs: dict[str, Any], memory: dict[str, Any]) -> None:
    """The backward pass uses them even if others have taken their places, as after `torch.func.functional_call`."""
    norms = {"train": ["**.input_layernorm", "**.post_attention_layernorm"]}

    def second_derivatives(**document: Any) -> list[Tensor]:
        model = trained_copy(base, {"dropout": 0.0}, **norms, **document)
        gradients(model, inputs)
        own = {n: (p.detach() * 1.5 + 0.01).requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
        loss = torch.func.functional_call(model, own, kwargs=dict(inputs)).logits.square().mean()
        return list(torch.autograd.grad(loss, list(own.values())))

    for ours, plain in zip(second_derivatives(memory=memory), second_derivatives(**PLAIN), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-14)


@pytest.mark.full
def test_nothing_is_left_behind(usual: Any, inputs: dict[str, Any]) -> None:
    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) for each in gc.get_objects())

    gradients(usual, inputs)
    before = alive()
    for _ in range(3):
        gradients(usual, inputs)
        loss_of(usual, inputs)  # the loss is never used
    assert alive() <= before


def test_equal_layers_share_their_plans(usual: Any, inputs: dict[str, Any]) -> None:
    gradients(usual, inputs)
    codes = [code for block in usual.blocks.values() for code in block._graftc.functions.values()]
    training = {code for code in codes if isinstance(code, TrainingCode)}
    assert len(training) == 1 < len(usual.blocks)


@pytest.mark.slow
def test_transforms_of_functions(base: Any, inputs: dict[str, Any]) -> None:
    """`torch.func` allows no hooks, so autograd keeps there all that it saves."""
    model = trained_copy(base, {"dropout": 0.0})
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor]) -> Tensor:
        value: Tensor = torch.func.functional_call(model, values, kwargs=dict(inputs)).logits.square().mean()
        return value

    result = torch.func.grad(loss)(own)
    for name, gradient in gradients(model, inputs, lambda m, given: m(**given).logits.square().mean()).items():
        torch.testing.assert_close(result[name], gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.full
def test_autocast(base: Any) -> None:
    base = copy.deepcopy(base).float()
    ours, plain = trained_copy(base), trained_copy(base, **PLAIN)
    inputs = inputs_for(ours)

    def run(model: Any, given: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model, given)

    assert equal(gradients(ours, inputs, run), gradients(plain, inputs, run))


@pytest.mark.full
def test_a_budget_that_cannot_be_met_says_what_is_kept(base: Any, inputs: dict[str, Any]) -> None:
    model = trained_copy(base, memory={"budget": 1e-6})
    with pytest.warns(graftc.GraftWarning, match=r"GC153: \d+% of the bytes that autograd keeps are kept"):
        gradients(model, inputs)


@pytest.mark.full
def test_what_is_small_first_may_be_large_later(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that has too little to save does not decide for other calls."""
    monkeypatch.setattr(minimum_cut, "WORTH", 2**16)
    model = trained_copy(base, {"rank": 3})  # equal graphs share plans, and other tests have made some
    small, large = (torch.ones(2, size).long() for size in (2, 100))
    for ids in (small, large):
        gradients(model, {"input_ids": ids})
    kept = [model.activations(input_ids=ids) for ids in (small, large)]
    # The graph around the layers does not depend on the rank: other tests have the same one, and may have planned it.
    assert all(layer.kept == layer.without for layer in kept[0].layers if layer.module)
    assert kept[1].kept < 0.9 * kept[1].without
