"""The report counts sites, parameters, bytes and operations correctly."""

from __future__ import annotations

import pytest
import torch

import graftc
from graftc.testing import families


@pytest.mark.slow
def test_counts_bytes_and_flops_of_lora_on_bert() -> None:
    spec = {
        "adapt": [{"method": "lora", "target": {"role": ["attn.q", "ffn.down"]}, "rank": 3}],
        "train": ["classifier"],
    }
    report = graftc.check(spec, families.bert())
    (lora, trained) = report.adaptations
    # Per layer: q is 48 to 48, down is 80 to 48.
    assert lora.sites == 4
    assert lora.trainable_parameters == 2 * 3 * ((48 + 48) + (80 + 48))
    assert lora.bytes == 4 * lora.trainable_parameters
    assert lora.flops_per_token == 2 * lora.trainable_parameters
    assert (trained.name, trained.trainable_parameters) == ("trained", 48 * 3 + 3)
    assert report.trainable_parameters == lora.trainable_parameters
    assert report.trained_in_full == 147
    base = sum(p.numel() for p in families.bert().parameters())
    assert report.base_parameters == base
    assert report.percent == pytest.approx(100 * lora.trainable_parameters / (base + lora.trainable_parameters))


@pytest.mark.slow
def test_fused_rows_count_their_own_outputs_only() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}, "rank": 4}]}
    report = graftc.check(spec, families.gpt2())
    assert report.trainable_parameters == 2 * 4 * (48 + 48)


@pytest.mark.slow
def test_frozen_starting_factors_are_counted_apart() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}, "rank": 4, "init": "pissa"}]}
    (entry,) = graftc.check(spec, families.bert()).adaptations
    assert entry.frozen_parameters == entry.trainable_parameters == 2 * 4 * (48 + 48)


@pytest.mark.slow
def test_the_base_flops_are_those_of_its_matrices() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}, "rank": 1}]}
    model = families.llama()
    report = graftc.check(spec, model)
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert report.flops_per_token == pytest.approx(2 * matrices, rel=0.01)


@pytest.mark.full
def test_meta_gives_the_same_report() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}]}
    with torch.device("meta"):
        model = families.llama()
    on_meta = graftc.check(spec, model)
    assert on_meta.adaptations == graftc.check(spec, families.llama()).adaptations
