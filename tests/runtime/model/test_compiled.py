"""The compiled model behaves like the model it came from."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.model.blocks import Block
from graftc.testing import families
from tests.kit.comparing import gradients_of
from tests.kit.models import fresh

LORA = {"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}


def text(batch: int = 3, length: int = 6, vocab: int = 100) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch * 31 + length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": torch.randint(0, vocab, (batch, length), generator=generator), "attention_mask": mask}


def perturb(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.mark.full
def test_loss_from_labels_is_the_models_own() -> None:
    model = families.bert().eval()
    adapted = fresh(model, LORA).eval()
    labels = torch.tensor([0, 2, 1])
    with torch.no_grad():
        expected = model(**text(), labels=labels)
        outputs = adapted(**text(), labels=labels)
    assert torch.equal(outputs.loss, expected.loss)
    assert torch.equal(outputs.logits, expected.logits)
    assert type(outputs) is type(expected)


@pytest.mark.full
def test_causal_loss_from_labels_is_the_models_own() -> None:
    model = families.llama().eval()
    adapted = fresh(model, LORA).eval()
    inputs = text()
    with torch.no_grad():
        expected = model(**inputs, labels=inputs["input_ids"]).loss
        assert torch.equal(adapted(**inputs, labels=inputs["input_ids"]).loss, expected)


@pytest.mark.full
def test_float_labels_are_another_loss_than_integer_ones() -> None:
    model = families.bert().eval()
    adapted = fresh(model, LORA).eval()
    integers, floats = torch.tensor([0, 2, 1]), torch.rand(3, 3)
    with torch.no_grad():
        for labels in (integers, floats, integers):
            copied = copy.deepcopy(model)  # a transformers model keeps the first problem type that it saw
            assert torch.equal(adapted(**text(), labels=labels).loss, copied(**text(), labels=labels).loss)


@pytest.mark.full
@pytest.mark.parametrize("batch, length", [(1, 1), (1, 5), (4, 1), (2, 9)])
def test_every_size_runs(batch: int, length: int) -> None:
    model = families.gpt2().eval()
    adapted = fresh(model, LORA).eval()
    inputs = {"input_ids": text(batch, length)["input_ids"], "attention_mask": torch.ones(batch, length).long()}
    with torch.no_grad():
        assert torch.equal(adapted(**inputs).logits, model(**inputs).logits)


@pytest.mark.full
def test_an_absent_input_is_another_signature_over_the_same_tensors() -> None:
    model = families.bert().eval()
    adapted = fresh(model, LORA).eval()
    perturb(adapted)
    before = {name: tensor.data_ptr() for name, tensor in adapted.full_state_dict().items()}
    ids = text()["input_ids"]
    with torch.no_grad():
        alone = adapted(input_ids=ids).logits
        masked = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(alone, masked, atol=1e-6, rtol=0)
    assert {name: tensor.data_ptr() for name, tensor in adapted.full_state_dict().items()} == before


@pytest.mark.slow
def test_positional_inputs_and_tuples() -> None:
    model = families.bert().eval()
    adapted = fresh(model, LORA).eval()
    inputs = text()
    with torch.no_grad():
        outputs = adapted(inputs["input_ids"], inputs["attention_mask"], return_dict=False)
        assert torch.equal(outputs[0], model(**inputs).logits)


@pytest.mark.slow
def test_unknown_input_is_a_coded_error() -> None:
    adapted = fresh(families.bert(), LORA)
    with pytest.raises(
        graftc.GraftError, match=r"GC031: .* no input 'atention_mask'(.|\n)*did you mean 'attention_mask'"
    ):
        adapted(input_ids=text()["input_ids"], atention_mask=text()["attention_mask"])


@pytest.mark.full
def test_the_source_model_is_never_changed() -> None:
    model = families.bert()
    model.train()
    model.bert.pooler.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    config = copy.deepcopy(model.config.to_dict())
    adapted = fresh(model, LORA, train=["classifier"])
    adapted(**text(), labels=torch.tensor([0, 1, 2])).loss.backward()
    perturb(adapted)
    adapted.merge()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    assert model.config.to_dict() == config
    assert "forward" not in vars(model)


@pytest.mark.slow
def test_blocks_own_their_layers_tensors() -> None:
    adapted = fresh(families.bert(), LORA)
    assert list(adapted.blocks) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    for path, block in adapted.blocks.items():
        assert isinstance(block, Block)
        names = {f"{path}.{name}" for name, _ in block.named_parameters()}
        assert names == {name for name, _ in adapted.named_parameters() if name.startswith(f"{path}.")}
        assert any(".graftc.lora." in name for name in names)


@pytest.mark.slow
def test_identical_layers_share_one_code_object() -> None:
    adapted = fresh(families.llama(), LORA).eval()
    first, second = adapted.blocks.values()
    key = next(key for key in first._graftc.functions if key.startswith("adapted forward eval"))
    assert first._graftc.functions[key] is second._graftc.functions[key]


@pytest.mark.full
@pytest.mark.parametrize("make", [families.bert, families.llama, families.vit])
def test_checkpointing_gives_the_same_gradients(make: Any) -> None:
    model = make()
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32)} if make is families.vit else text()
    gradients = []
    for checkpoint in (None, "layers"):
        spec = {"adapt": [{**LORA, "dropout": 0.2}], "checkpoint": checkpoint}
        adapted = graftc.compile(spec, model, seed=0).train()
        assert adapted.is_gradient_checkpointing == (checkpoint == "layers")
        perturb(adapted)
        torch.manual_seed(3)
        adapted(**inputs).logits.pow(2).mean().backward()
        gradients.append(gradients_of(adapted))
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.full
def test_checkpointing_keeps_less_for_backward() -> None:
    model = families.bert()
    kept = []
    for checkpoint in (None, "layers"):
        adapted = fresh(model, LORA, checkpoint=checkpoint).train()
        alive: list[int] = []

        def pack(tensor: Tensor, alive: list[int] = alive) -> Tensor:
            alive.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            adapted(**text(8, 32))
        kept.append(sum(alive))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.full
def test_disabled_gives_the_bases_outputs() -> None:
    model = families.gpt2().eval()
    adapted = fresh(model, LORA).eval()
    perturb(adapted)
    with torch.no_grad():
        with adapted.disabled():
            assert torch.equal(adapted(**text()).logits, model(**text()).logits)
        assert not torch.equal(adapted(**text()).logits, model(**text()).logits)


@pytest.mark.slow
def test_another_dtype_is_refused_before_anything_moves() -> None:
    adapted = fresh(families.bert(), LORA)
    with pytest.raises(graftc.GraftError, match="GC033"):
        adapted.to(torch.bfloat16)
    assert {p.dtype for p in adapted.parameters()} == {torch.float32}


@pytest.mark.full
def test_moving_to_another_device_retargets_the_graphs() -> None:
    adapted = fresh(families.bert(), LORA).eval()
    adapted.to("meta")
    inputs = {name: value.to("meta") for name, value in text().items()}
    assert adapted(**inputs).logits.device.type == "meta"


@pytest.mark.full
def test_no_literal_device_stays_in_a_graph() -> None:
    adapted = fresh(families.llama(), LORA)
    for mode in ("train", "eval"):
        assert "cpu" not in adapted.print_graph(mode)


@pytest.mark.slow
def test_forward_has_the_models_signature() -> None:
    model = families.bert()
    assert inspect.signature(fresh(model, LORA).forward) == inspect.signature(model.forward)


@pytest.mark.slow
def test_tied_weights_are_saved_once_and_loaded_again() -> None:
    adapted = fresh(families.gpt2(), LORA)
    state = adapted.full_state_dict()
    assert "transformer.wte.weight" in state
    assert "lm_head.weight" not in state
    adapted.load_state_dict(state)


@pytest.mark.slow
def test_adapter_tensors_that_do_not_fit_are_refused_whole() -> None:
    adapted = fresh(families.bert(), LORA)
    saved = {name: tensor.clone() for name, tensor in adapted.adapter_state_dict().items()}
    broken = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    broken[next(iter(broken))] = torch.zeros(1)
    with pytest.raises(graftc.GraftError, match="GC053"):
        adapted.load_adapter_state_dict(broken)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in adapted.adapter_state_dict().items())


@pytest.mark.full
def test_initial_values_do_not_depend_on_order_or_global_state() -> None:
    first = graftc.compile({"adapt": [LORA]}, families.bert(), seed=0).adapter_state_dict()
    torch.manual_seed(99)
    spec = {"adapt": [{**LORA, "target": {"role": ["attn.v", "attn.q", "attn.o"]}}]}
    second = graftc.compile(spec, families.bert(), seed=0).adapter_state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class Plain(nn.Module):
    """A hand-written model without a config, whose output is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
        self.last = nn.Linear(5, 2, bias=False)

    def forward(self, features: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            features = features + torch.relu(layer(features))
        return self.last(features), features


@pytest.mark.slow
def test_any_module_compiles_folds_and_keeps_its_output_form() -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    spec = {"adapt": [{"method": "lora", "target": {"modules": ["layers.*", "last"]}, "rank": 2}]}
    adapted = graftc.compile(spec, model, {"features": torch.zeros(1, 5)}).eval()
    perturb(adapted)
    x = torch.randn(4, 5)
    merged = adapted.merge()
    with torch.no_grad():
        outputs = adapted(x)
        assert isinstance(outputs, tuple)
        torch.testing.assert_close(merged(x)[0], outputs[0], atol=2e-5, rtol=0)
        assert not torch.allclose(outputs[0], model(x)[0])


def test_inputs_of_an_unknown_model_have_to_be_shown() -> None:
    with pytest.raises(graftc.GraftError, match=r"GC030(.|\n)*example_inputs"):
        graftc.compile({"adapt": [{"method": "lora", "target": {"modules": "last"}}]}, Plain())


@pytest.mark.full
def test_a_merged_model_does_not_train() -> None:
    merged = fresh(families.bert(), LORA).merge(allow_unchanged=True)
    with pytest.raises(graftc.GraftError, match="GC054"):
        merged.train()


@pytest.mark.full
def test_transformers_loads_what_was_merged(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    adapted = fresh(families.gpt2(), LORA).eval()
    perturb(adapted)
    merged = adapted.merge()
    merged.to_transformers().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**text()).logits, adapted(**text()).logits, atol=2e-5, rtol=0)
    assert type(loaded) is type(families.gpt2())
