"""The base beside the adapted model: the reference of preference optimisation, and the head that losses read."""

from __future__ import annotations

import copy
import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.model.head import Head
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import gpt2, tiny
from graftc.testing.perturbing import perturb
from tests.kit.models import adapted

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
LORA = {"method": "lora", "rank": 2, "dropout": 0.3, "target": {"role": ["attn.q", "ffn.up"]}}


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_it_computes_what_the_base_does_whatever_mode_the_model_is_in(family: str) -> None:
    compiled = adapted(family, LORA, noise=0.1)
    source = compiled.compilation.model.eval()
    reference = compiled.reference()
    with torch.no_grad():
        expected = source(input_ids=IDS).logits
        for mode in (True, False):
            compiled.train(mode)
            assert torch.equal(reference(input_ids=IDS).logits, expected)
            assert compiled.training is mode and not reference.train().training
        assert not torch.allclose(compiled(input_ids=IDS).logits, expected), "the model is adapted as before"
        hidden = reference.base_model(input_ids=IDS).last_hidden_state
        own = getattr(source, source.base_model_prefix)(input_ids=IDS).last_hidden_state
    assert torch.allclose(hidden, own, atol=1e-6)
    assert reference.config is compiled.config and reference.dtype == compiled.dtype


@pytest.mark.slow
def test_it_has_no_tensor_and_cannot_be_copied_apart() -> None:
    compiled = adapted("llama", LORA, noise=0.1)
    sizes = {tuple(p.shape) for p in compiled.compilation.source.parameters()}

    def alive() -> set[int]:
        gc.collect()
        tensors = (o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and tuple(o.shape) in sizes)
        return {t.untyped_storage().data_ptr() for t in tensors}

    before = alive()
    reference = copy.deepcopy(compiled.reference())
    with torch.no_grad():
        reference(input_ids=IDS)
    assert alive() <= before
    assert not [*reference.parameters(), *reference.buffers()]
    perturb(compiled, 0.1)  # the reference has no tensors of its own
    with torch.no_grad():
        expected = compiled.compilation.model.eval()(input_ids=IDS).logits
        assert torch.equal(reference(input_ids=IDS).logits, expected)


@pytest.mark.slow
def test_references_of_two_bases_are_told_apart_by_their_state() -> None:
    torch.manual_seed(1)
    one, two = adapted("llama", LORA, noise=0.1).reference(), adapted("gpt2", LORA, noise=0.1).reference()
    assert list(one.state_dict()) == ["_extra_state"]
    assert not torch.equal(one.state_dict()["_extra_state"], two.state_dict()["_extra_state"])


@pytest.mark.full
def test_a_trained_head_is_the_one_that_losses_see() -> None:
    compiled = adapted("llama", LORA, noise=0.1, train=["lm_head"])
    head = compiled.get_output_embeddings()
    assert isinstance(head, Head) and head.bias is None
    with torch.no_grad():
        hidden = compiled.eval().base_model(input_ids=IDS).last_hidden_state
        assert torch.allclose(hidden @ head.weight.T, compiled(input_ids=IDS).logits, atol=1e-5)
        assert compiled.reference().get_output_embeddings().weight is compiled.get_submodule("lm_head").weight
    head.weight.sum().backward()
    assert compiled.get_parameter("lm_head.graftc.trained.weight").grad is not None
    with pytest.raises(GraftError, match="GC043"):
        head(hidden)


@pytest.mark.full
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_hidden_states_are_those_of_the_text_alone(method: str) -> None:
    """Virtual tokens are left out, so that labels fit."""
    compiled: Any = graftc.compile({"adapt": [{"method": method, "length": 3}]}, tiny("llama"))
    perturb(compiled, 0.3)
    with torch.no_grad():
        hidden = compiled.eval().base_model(input_ids=IDS).last_hidden_state
        logits = hidden @ compiled.get_output_embeddings().weight.T
        assert torch.allclose(logits, compiled(input_ids=IDS).logits, atol=1e-5)


@pytest.mark.full
def test_rows_of_a_head_that_train_are_in_its_place() -> None:
    compiled = graftc.compile({"adapt": [LORA], "tokens": {"add": ["<x>"]}}, gpt2())
    perturb(compiled, 0.1)
    head: Any = compiled.eval().get_output_embeddings()
    with torch.no_grad():
        hidden = compiled.base_model(input_ids=IDS).last_hidden_state
        assert torch.allclose(hidden @ head.weight.T, compiled(input_ids=IDS).logits, atol=1e-5)
    assert not torch.equal(head.weight, compiled.compilation.model.lm_head.weight)


@pytest.mark.full
@pytest.mark.parametrize("method", ["lora", "dora", "bottleneck"])
def test_an_adapted_head_is_refused_when_its_weight_is_read(method: str) -> None:
    compiled = graftc.compile({"adapt": [{"method": method, "target": {"role": ["attn.q", "head"]}}]}, tiny("llama"))
    with pytest.raises(GraftError, match=f"GC072: the head lm_head is adapted by '{method}'"):
        compiled.get_output_embeddings().weight  # noqa: B018


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_dropouts_that_are_set_to_zero_drop_nothing(family: str) -> None:
    """Dropouts of the base and of adaptations are set one by one, also for code of `torch.compile`."""
    compiled = adapted(family, LORA, noise=0.1).train()
    dropouts = [m for m in compiled.modules() if isinstance(m, nn.Dropout)]
    with torch.no_grad():
        expected = copy.deepcopy(compiled).eval()(input_ids=IDS).logits
        assert not torch.equal(compiled(input_ids=IDS).logits, compiled(input_ids=IDS).logits)
        for module in dropouts:
            module.p = 0
        assert family != "bert" or len(dropouts) > 4
        assert torch.equal(compiled(input_ids=IDS).logits, expected)
        run = torch.compile(compiled, backend="eager")
        assert torch.allclose(run(input_ids=IDS).logits, expected, atol=1e-6)
        dropouts[-1].p = 0.3 if family == "llama" else 0.1
        assert not torch.equal(compiled(input_ids=IDS).logits, compiled(input_ids=IDS).logits)


@pytest.mark.full
def test_a_copy_runs_itself_after_a_trainer_has_changed_forward() -> None:
    import types

    compiled = adapted("llama", LORA, noise=0.1).eval()
    own = compiled.forward
    compiled.forward = types.MethodType(lambda self, *args, **kwargs: own(*args, **kwargs), compiled)
    copied = copy.deepcopy(compiled)
    for tensor in copied.adapter_state_dict().values():
        tensor.zero_()
    with torch.no_grad():
        assert not torch.allclose(copied(input_ids=IDS).logits, compiled(input_ids=IDS).logits)


@pytest.mark.slow
def test_dropouts_in_wrapped_layers_that_are_set_to_zero_drop_nothing() -> None:
    """Accelerate wraps layers whose activations are recomputed."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    compiled = adapted("llama", LORA, noise=0.1).train()
    layers: Any = compiled.get_submodule("model.layers")
    for name, layer in list(layers._modules.items()):
        layers._modules[name] = checkpoint_wrapper(layer)
    for module in compiled.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=IDS).logits, compiled(input_ids=IDS).logits)


@pytest.mark.slow
def test_dropouts_of_zero_leave_masks_of_gradients_alone() -> None:
    """A module whose only dropout drops nothing still trains: the gradients of its own tensors are masked."""
    compiled = graftc.compile({"adapt": [{"method": "child_tuning", "reserve_p": 0.5}]}, tiny("vit")).train()
    torch.manual_seed(0)
    compiled(torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    name = "vit.embeddings.graftc.child_tuning.position_embeddings"
    kept = (dict(compiled.named_parameters())[name].grad != 0).double().mean()
    assert 0.3 < float(kept) < 0.7


@pytest.mark.slow
def test_the_reference_and_the_model_run_in_two_threads() -> None:
    """Both models share the base tensors and the table of code, and do not affect each other."""
    compiled = adapted("llama", LORA, noise=0.1).eval()
    reference = compiled.reference()
    with torch.no_grad():
        expected = {model: model(input_ids=IDS).logits for model in (compiled, reference)}
    assert not torch.equal(*expected.values())
    wrong: list[nn.Module] = []
    together = threading.Barrier(2)

    def run(model: nn.Module) -> None:
        together.wait()
        with torch.no_grad():
            wrong.extend(model for _ in range(50) if not torch.equal(model(input_ids=IDS).logits, expected[model]))

    threads = [threading.Thread(target=run, args=(model,)) for model in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
