"""Attributes of a compiled model that other libraries use, and coded errors for those that graftc replaces."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.model.libraries import ELSEWHERE
from graftc.runtime.training.repeated import share
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import tiny
from tests.kit.models import fresh
from tests.kit.refusals import refused

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}]}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("gpt2")


@pytest.fixture(scope="module")
def adapted_model(model: Any) -> Any:
    return fresh(model, **SPEC)


class Own(nn.Module):
    """A model that takes keywords of the loss, and may state whether it does."""

    def __init__(self, says: bool | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        if says is not None:
            self.accepts_loss_kwargs = says

    def forward(self, states: Tensor, **kwargs: Any) -> Tensor:
        return self.linear(states)


class Closed(Own):
    def forward(self, states: Tensor, shift: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.linear(states)


@pytest.mark.parametrize(
    ("make", "expected"),
    [(Own, True), (lambda: Own(False), False), (Closed, False), (lambda: Closed(True), True)],
    ids=["any keyword", "any, but says no", "no keyword", "none, but says yes"],
)
def test_keywords_of_the_loss_are_taken_as_the_source_takes_them(make: Any, expected: bool) -> None:
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "linear"}}]}
    assert graftc.compile(spec, make(), (torch.ones(2, 4),)).accepts_loss_kwargs is expected


@pytest.mark.slow
def test_what_a_source_says_of_itself_is_copied(model: Any, adapted_model: Any) -> None:
    assert adapted_model.accepts_loss_kwargs
    assert adapted_model.loss_type == model.loss_type and adapted_model.base_model_prefix == model.base_model_prefix
    assert adapted_model.name_or_path == model.name_or_path
    assert adapted_model.generation_config is not model.generation_config
    assert adapted_model.generation_config.to_dict() == model.generation_config.to_dict()
    assert adapted_model.can_generate() and not hasattr(adapted_model, "hf_device_map")
    assert "GPT2LMHeadModel" in type(adapted_model).__name__, "the Trainer looks for words in the name of a class"


@pytest.mark.slow
def test_counts_are_those_of_transformers_and_peft(
    model: Any, adapted_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    added = sum(t.numel() for t in adapted_model.adapter_state_dict().values())
    for embeddings in (False, True):
        whole = model.num_parameters(exclude_embeddings=embeddings)
        assert adapted_model.num_parameters(exclude_embeddings=embeddings) == whole + added
    assert adapted_model.num_parameters(only_trainable=True) == added
    adapted_model.print_trainable_parameters()
    assert f"trainable params: {added:,d} || all params: {model.num_parameters() + added:,d}" in capsys.readouterr().out
    assert adapted_model.floating_point_ops({"input_ids": torch.ones(2, 3)}) == 36 * adapted_model.num_parameters(
        exclude_embeddings=True
    )


def test_embeddings_and_tags(adapted_model: Any) -> None:
    assert adapted_model.get_input_embeddings() is adapted_model.get_submodule("transformer.wte")
    assert adapted_model.get_output_embeddings() is adapted_model.get_submodule("lm_head")
    adapted_model.add_model_tags("one")
    adapted_model.add_model_tags(["two", "one"])
    assert adapted_model.model_tags == ["one", "two"]
    adapted_model.enable_input_require_grads()


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "mixtral"])
def test_sizes_ties_and_the_decoder_are_those_of_the_source(family: str) -> None:
    source = tiny(family)
    adapted = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}]}, source)
    added = sum(tensor.numel() * tensor.element_size() for tensor in adapted.adapter_state_dict().values())
    store = adapted.compilation.store
    constants = sum(store.get(name).nbytes for name in store.constants)  # numbers that `forward` makes into tensors
    for buffers in (True, False):
        more = added + constants * buffers
        assert adapted.get_memory_footprint(buffers) == source.get_memory_footprint(buffers) + more
    before = {name: tensor.data_ptr() for name, tensor in adapted.full_state_dict().items()}
    adapted.tie_weights()
    assert {name: tensor.data_ptr() for name, tensor in adapted.full_state_dict().items()} == before
    path = next(path for path, module in source.named_modules() if module is source.get_decoder())
    assert adapted.get_decoder() is adapted.get_submodule(path)


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_a_method_that_is_done_otherwise_says_how(adapted_model: Any, name: str) -> None:
    assert not hasattr(adapted_model, name)
    refused(lambda: getattr(adapted_model, name)(1), code="GC072")


@pytest.mark.parametrize(
    "write",
    [
        *(lambda model, protocol=protocol: pickle.dumps(model, protocol) for protocol in range(6)),
        lambda model: torch.save(model, io.BytesIO()),
        lambda model: torch.save({"model": nn.Sequential(model)}, io.BytesIO()),
    ],
)
def test_a_model_is_not_pickled(adapted_model: Any, write: Callable[[Any], object]) -> None:
    refused(write, adapted_model, code="GC074")


def test_copies_are_made_all_the_same(adapted_model: Any) -> None:
    merged = adapted_model.merge(allow_unchanged=True)
    refused(pickle.dumps, merged, code="GC074")
    assert copy.copy(adapted_model).adapter_state_dict().keys() == adapted_model.adapter_state_dict().keys()
    assert copy.deepcopy(merged).folded_state_dict().keys() == merged.folded_state_dict().keys()


@pytest.mark.parametrize("entry", [graftc.compile, graftc.check, lambda spec, model: graftc.roles(model)])
@pytest.mark.parametrize(
    "make",
    [
        lambda compiled: "some/id",
        lambda compiled: nn.Linear,
        lambda compiled: None,
        lambda compiled: compiled.state_dict(),
        lambda compiled: compiled,
        lambda compiled: nn.Sequential(nn.Identity(), compiled),
        lambda compiled: compiled.merge(allow_unchanged=True),
    ],
    ids=["name", "class", "None", "tensors", "compiled", "a part is compiled", "merged"],
)
def test_what_is_no_plain_model_is_no_base(adapted_model: Any, make: Any, entry: Any) -> None:
    refused(entry, SPEC, make(adapted_model), code="GC073")


@pytest.mark.slow
def test_a_base_with_layers_of_peft_is_refused_when_it_is_compiled(model: Any) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    prompt = peft.get_peft_model(
        copy.deepcopy(model), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    for base in (adapted, adapted.base_model, adapted.base_model.model, prompt):
        with pytest.raises(GraftError, match="of peft") as caught:
            graftc.compile(SPEC, base)
        assert caught.value.code == "GC032" and "merge_and_unload" in str(caught.value)
    with pytest.raises(GraftError, match="c_attn'"):
        graftc.check(SPEC, adapted.get_base_model())
    graftc.check(SPEC, adapted.merge_and_unload())


def test_a_config_of_peft_that_says_nothing_here_is_no_spec(model: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_bias": true}', encoding="utf-8")
    refused(graftc.compile, {"one": config, "other": config}, model, code="GC073")
    for spec in (peft.OFTConfig(target_modules=["c_attn"]), tmp_path / "adapter_config.json"):
        refused(graftc.compile, spec, model, code="GC112")


@pytest.mark.parametrize("names", [["x"], "x", True, {"x": 1}])
def test_names_of_adaptations_are_no_budget(adapted_model: Any, names: Any) -> None:
    refused(adapted_model.merge, budget=names, code="GC073")
    refused(adapted_model.merge_partially, names, code="GC073")
    refused(adapted_model.merge, names, code="GC091" if names in ("x", ["x"]) else "GC073")


@pytest.mark.parametrize(("names", "code"), [(("x",), "GC091"), ((["x"],), "GC073"), ((3,), "GC073")])
def test_disabling_takes_names_of_adaptations(adapted_model: Any, names: Any, code: str) -> None:
    refused(lambda: adapted_model.disabled(*names).__enter__(), code=code)


@pytest.mark.full
@pytest.mark.parametrize("count", [3, 11, torch.tensor(5), torch.tensor(5.0), torch.tensor([5]), 2.5])
def test_the_number_of_items_is_no_constant_of_a_graph(model: Any, adapted_model: Any, count: Any) -> None:
    """The loss is the mean over that many labels, as in the source, and another number needs no other graph."""
    ids = torch.arange(5, 19).reshape(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad(), adapted_model.disabled():
        loss = adapted_model(**inputs, num_items_in_batch=count).loss
        assert loss.dtype == model(**inputs, num_items_in_batch=count).loss.dtype
        torch.testing.assert_close(loss, model(**inputs, num_items_in_batch=count).loss, atol=1e-6, rtol=0)
        before = len(adapted_model.compilation.signatures)
        torch.testing.assert_close(
            adapted_model(**inputs, num_items_in_batch=count * 2).loss * 2, loss, atol=1e-6, rtol=0
        )
    assert len(adapted_model.compilation.signatures) == before


@pytest.mark.full
def test_the_mean_over_items_is_that_of_all_adaptations_that_run_side_by_side(model: Any) -> None:
    member = {"method": "lora", "rank": 2, "target": {"role": "attn.q"}}
    spec = {"adapt": [{"name": "one", **member}, {"name": "two", **member}], "compose": {"parallel": ["one", "two"]}}
    both = graftc.compile(spec, model).eval()
    ids = torch.arange(5, 19).reshape(2, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        mean = both(**inputs).loss
        torch.testing.assert_close(both(**inputs, num_items_in_batch=12).loss, mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shift", "rank"), [(0, 1), (0, 2), (1, 2)])
def test_terms_beside_the_loss_are_weighted_by_labels(shift: int, rank: int) -> None:
    """Terms that objectives add in several calls of one step sum up to the mean, as losses do."""
    labels = torch.arange(24).reshape((24,) if rank == 1 else (4, 6))
    if rank == 2:
        labels[0, 2:] = -100
    count = (labels[..., shift:] != -100).sum()
    parts = [share({"labels": part, "num_items_in_batch": count}, shift) for part in labels.split(2)]
    torch.testing.assert_close(torch.stack([torch.as_tensor(part) for part in parts]).sum(), torch.tensor(1.0))
    assert share({"labels": labels}, shift) == share({"num_items_in_batch": count}, shift) == 1


@pytest.mark.slow
def test_trainers_find_the_labels_of_questions() -> None:
    from transformers import BertConfig, BertForQuestionAnswering
    from transformers.utils.generic import find_labels

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForQuestionAnswering(BertConfig(vocab_size=50, **sizes))
    compiled = graftc.compile(SPEC, model)
    assert find_labels(type(compiled)) == find_labels(type(model)) == ["start_positions", "end_positions"]
