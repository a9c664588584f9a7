"""Prefixes in models that run their own Python between graphs: attention is in the graphs of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.kit.models import adapted
from tests.runtime.live.models import qwen2_vl


@pytest.mark.slow
def test_it_is_a_cache_of_keys_and_values_with_images_text_and_a_cache() -> None:
    """Texts without padding have no mask, and their keys are not repeated for the queries of a group."""
    case = qwen2_vl()
    model: Any = case.model
    compiled = adapted(model, {"method": "prefix", "length": 3}, inputs=case.first, cache=False, noise=0.5)
    text = {"input_ids": torch.tensor([[1, 20, 30, 41, 5]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    own = dict(compiled.named_parameters())
    for batch in (case.second, text):
        asked = {name: value for name, value in batch.items() if name != "labels"}
        mask, rows = asked["attention_mask"], len(asked["input_ids"])
        cache = DynamicCache(config=model.config.get_text_config())
        for layer in range(2):
            place = f"model.language_model.layers.{layer}.self_attn.graftc.prefix.attn"
            pair = (own[f"{place}.{part}"].detach().unflatten(1, (2, 8)).transpose(0, 1) for part in ("keys", "values"))
            cache.update(*(each.expand(rows, -1, -1, -1) for each in pair), layer)
        kinds = asked.get("mm_token_type_ids", torch.zeros_like(mask))
        positions, _ = model.model.get_rope_index(
            input_ids=asked["input_ids"],
            image_grid_thw=asked.get("image_grid_thw"),
            attention_mask=mask,
            mm_token_type_ids=kinds,
        )
        longer = {**asked, "attention_mask": torch.cat([torch.ones(rows, 3, dtype=torch.long), mask], 1)}
        with torch.no_grad():
            wanted = model(**longer, position_ids=positions, past_key_values=cache).logits
            given = compiled(**asked).logits
            assert float((given - wanted)[mask.bool()].abs().max()) < 1e-5
            assert float((given - model(**asked).logits).abs().max()) > 1e-2
            told = [
                compiled.generate(**asked, max_new_tokens=6, do_sample=False, eos_token_id=0, use_cache=use)
                for use in (True, False)
            ]
        assert torch.equal(*told)
