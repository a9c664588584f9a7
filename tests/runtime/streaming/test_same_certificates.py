"""Certificates of a merge from files equal those of the same merge in memory, entry by entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.records.certificate import Certificate, SiteEvidence
from graftc.runtime.sources.models import load_model
from graftc.runtime.streaming import sites
from graftc.testing import perturb
from tests.runtime.streaming.support import peft_adapter

ROLES = {"role": ["attn.q", "attn.v", "ffn.down"]}
LORA = {"method": "lora", "target": ROLES, "rank": 4}
BIASED = {"attention_bias": True, "mlp_bias": True}
SUMS = 1e-12
"""How far numbers may be apart, relatively: blocks and whole tensors are summed in another order, in float64."""

SPECS: dict[str, Any] = {
    "lora": {"adapt": [LORA]},
    "dora": {"adapt": [{**LORA, "method": "dora"}]},
    "ia3": {"adapt": [{"method": "ia3"}]},
    "scaled copy": {"adapt": [{"method": "bitfit"}, {"method": "ia3", "target": ROLES, "side": "output"}]},
    "bitfit": {"adapt": [{"method": "bitfit"}]},
    "biases of lora": {"adapt": [{**LORA, "bias": "lora_only"}]},
    "all biases": {"adapt": [{**LORA, "bias": "all"}]},
    "train": {"adapt": [LORA], "train": ["lm_head", "model.norm"]},
    "train under lora": {"adapt": [LORA], "train": ["**.q_proj"]},
}


def require_same(memory: Certificate, files: Certificate, *, ordered: bool = True) -> None:
    """Fail unless two certificates say the same of every site, of all of them, and of the dtype."""
    ours, theirs = memory.sites, files.sites
    if not ordered:
        ours, theirs = (tuple(sorted(each, key=lambda one: one.site)) for each in (ours, theirs))
    assert [(one.site, one.adaptations) for one in ours] == [(one.site, one.adaptations) for one in theirs]
    assert [_numbers(one) for one in ours] == [pytest.approx(_numbers(one), rel=SUMS) for one in theirs]
    assert all(one.algebra < 1e-14 for one in (*ours, *theirs))
    assert memory.retention.to_json() == pytest.approx(files.retention.to_json(), rel=SUMS)
    assert memory.dtype == files.dtype and memory.passed and files.passed


def _numbers(evidence: SiteEvidence) -> dict[str, float]:
    return {"change": evidence.change, "rounding": evidence.rounding, **evidence.retention.to_json()}


def biased_llama(folder: Path, dtype: torch.dtype) -> Path:
    """Write a tiny Llama with biases, all of them random, to several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes, **BIASED))
    perturb(model, 0.1)  # type: ignore[arg-type]
    model.to(dtype).save_pretrained(folder, max_shard_size="10KB")
    return folder


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS)
def test_files_give_the_certificate_of_memory(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where most weights have several blocks, and where biases are in other files than their weights."""
    monkeypatch.setattr(sites, "BLOCK", 300)
    base = biased_llama(tmp_path / "base", dtype)
    compiled = graftc.compile(SPECS[name], load_model(str(base)))
    perturb(compiled)
    compiled.save(tmp_path / "artifact", certify=False)
    files = graftc.merge_checkpoint(tmp_path / "artifact")
    require_same(compiled.merge().certificate, files.certificate)


@pytest.mark.full
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_of_peft_give_the_certificate_of_importing_them(bias: Any, tmp_path: Path) -> None:
    import peft

    base = biased_llama(tmp_path / "base", torch.float32)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], bias=bias, modules_to_save=["lm_head"])
    peft_adapter(tmp_path / "adapter", base, config)
    memory = graftc.import_peft(tmp_path / "adapter", load_model(str(base))).merge().certificate
    files = graftc.merge_checkpoint(tmp_path / "adapter", base).certificate
    names = {site.site: site.adaptations for site in memory.sites}
    renamed = {site.site: site.adaptations for site in files.sites}
    assert names.keys() == renamed.keys()
    changes = {site.site: site.change for site in memory.sites}
    assert changes == pytest.approx({site.site: site.change for site in files.sites}, rel=SUMS)


@pytest.mark.full
def test_a_copy_is_measured_by_its_values(tmp_path: Path) -> None:
    base = biased_llama(tmp_path / "base", torch.float32)
    compiled = graftc.compile(SPECS["bitfit"], load_model(str(base)))
    perturb(compiled)
    source = dict(load_model(str(base)).named_parameters())
    merged = compiled.merge()
    stored = merged.folded_state_dict()
    for site in merged.certificate.sites:
        assert site.site.endswith(".bias") and site.algebra == 0
        expected = (stored[site.site].double() - source[site.site].double()).abs().max()
        assert site.change == pytest.approx(float(expected), rel=1e-6)  # the copy is stored rounded to float32
