"""Added tokens of models that run their own Python between graphs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.compiler.live.refusals import adapted_tensors
from graftc.testing import perturb
from tests.kit.models import fresh
from tests.runtime.live.models import VOCABULARY, Case, gemma3, llava, looping, qwen2_vl

LORA: dict[str, Any] = {"method": "lora", "rank": 2, "target": {"regex": r".*\.(q_proj|v_proj|qkv|up)"}}
TOKENS: dict[str, Any] = {"add": ["<a>", "<b>"]}


def with_new(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a batch in which the last tokens are new ones."""
    batch = {name: value.clone() for name, value in batch.items()}
    for name in ("input_ids", "labels"):
        batch[name][:, -1], batch[name][0, -2] = VOCABULARY, VOCABULARY + 1
    return batch


def resized(model: Any) -> Any:
    """Return the model with room that transformers makes, and with the mean of all rows in the new ones."""
    longer = copy.deepcopy(model)
    longer.resize_token_embeddings(VOCABULARY + 2, mean_resizing=False)
    with torch.no_grad():
        for module in {longer.get_input_embeddings(), longer.get_output_embeddings()}:
            module.weight[VOCABULARY:] = module.weight[:VOCABULARY].mean(0)
    return longer


@pytest.mark.full
@pytest.mark.sample("qwen2_vl")
@pytest.mark.slow
@pytest.mark.parametrize("make", [qwen2_vl, gemma3, llava], ids=["qwen2_vl", "gemma3", "llava"])
def test_rows_train_and_merge_as_in_a_model_that_transformers_resized(make: Any, tmp_path: Path) -> None:
    """Head and table are two maps, or one that is tied; llava is one graph, but for calls with a cache."""
    case: Case = make()
    batches = [with_new(case.first), with_new(case.second)]
    compiled = fresh(case.model, LORA, inputs=case.first, cache=False, tokens=TOKENS)
    judge = resized(case.model)
    rows = [judge.get_input_embeddings().weight, judge.get_output_embeddings().weight]
    own = [p for name, p in compiled.named_parameters() if name.endswith("graftc.tokens.weight")]
    rows = rows[: len(own)]
    assert len(own) == (1 if make is gemma3 else 2)
    if make is not llava:
        assert adapted_tensors(compiled.compilation).keys() >= {compiled.compilation.store.canonical("lm_head.weight")}
    for batch in batches:
        losses = [model.train()(**batch).loss for model in (compiled, judge)]
        assert abs(losses[0] - losses[1]) < 1e-5
        ours, theirs = (torch.autograd.grad(loss, of) for loss, of in zip(losses, (own, rows), strict=True))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other[VOCABULARY:], atol=1e-6, rtol=1e-4)

    perturb(compiled.eval(), 0.3)
    merged = compiled.merge()
    merged.save(tmp_path / "merged")
    compiled.save(tmp_path / "adapter")
    again = type(case.model).from_pretrained(tmp_path / "merged")
    assert again.config.get_text_config().vocab_size == VOCABULARY + 2
    loaded = graftc.load(tmp_path / "adapter", case.model).eval()
    text = {"input_ids": torch.tensor([[1, 20, VOCABULARY, 30, VOCABULARY + 1]])}
    if make is gemma3:
        text["token_type_ids"] = torch.zeros_like(text["input_ids"])
    with torch.no_grad():
        for batch in (*batches, text):
            wanted = compiled(**batch).logits
            assert wanted.shape[-1] == VOCABULARY + 2
            for model in (merged, merged.to_transformers(), again, loaded):
                torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=0)
        asked = {name: value for name, value in batches[0].items() if name != "labels"}
        others = [[number] for number in range(VOCABULARY)]
        for options in ({}, {"bad_words_ids": others}):
            told = [
                model.generate(**asked, max_new_tokens=6, do_sample=False, eos_token_id=0, **options)
                for model in (again, compiled)
            ]
            assert torch.equal(*told)
    assert bool((told[0][:, -6:] >= VOCABULARY).all())


def test_a_model_without_a_table_is_refused() -> None:
    case = looping()
    with pytest.raises(graftc.GraftError, match="GC018"):
        fresh(case.model, LORA, inputs=case.first, cache=False, tokens=TOKENS)
