"""Whatever a folder contains, its card reads as one with plain names, and its metadata are those that were stated."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from graftc.files.tensors.headers import StoredTensor
from graftc.records.certificate import Certificate, SiteEvidence
from graftc.records.retention import Retention
from graftc.runtime.artifact.manifest import Versions
from graftc.runtime.artifact.records import MergedAdapter, MergedRecord
from graftc.runtime.card.merged import MergedFacts, merged_card
from graftc.runtime.card.metadata import StatedMetadata
from graftc.runtime.card.peft import peft_card, peft_facts
from tests.kit.markdown import HOSTILE, require_contained

STATED = StatedMetadata("owner/base", "mit", ["en"], ["my tag"], ["owner/data"])
NAMES = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40), st.text("`|<>&-#\n[]()*_~ \\'\":!{}%@", max_size=20))


def require_metadata(text: str, metadata: Any) -> None:
    """Check that the hub reads the metadata as graftc states them, and that none comes from a name."""
    read = ModelCard(text).data.to_dict()  # type: ignore[no-untyped-call]
    assert read == {field: value for field, value in metadata.to_json().items() if value}
    assert (read["base_model"], read["license"], read["datasets"]) == ("owner/base", "mit", ["owner/data"])
    assert set(read["tags"]) <= {"graftc", "lora", "my tag"}


def merged_facts(name: str) -> MergedFacts:
    """Return the facts of a merged model in which every free text is ``name``."""
    site = SiteEvidence(name, (name,), 1.0, 1e-15, 0.4)
    certificate = Certificate(
        (site,), {name: 1e-6}, 1e-4, "same", "same", additions=(name,), dtype=name, notes=(name,), retention=Retention()
    )
    versions = Versions.model_construct(graftc=name, python=name, torch=name, transformers=name, code=None)
    digest = "0" * 64
    record = MergedRecord(
        "graftc", 1, name, digest, certificate, {}, digest, MergedAdapter("peft", digest), versions=versions
    )
    tensor = StoredTensor(name, name, (2, 3), 0, 24)
    return MergedFacts(name, record, None, name, {name: tensor})


@pytest.mark.slow
@settings(max_examples=60)
@given(NAMES)
@example("\n---\nlicense: gpl\n---\n")
@example("| x | y |\n| --- | --- |\n")
def test_a_merged_model(name: str) -> None:
    text, metadata = merged_card(merged_facts(name), STATED)
    plain, _ = merged_card(merged_facts("plain"), STATED)
    require_contained(text, plain)
    require_metadata(text, metadata)
    assert ("pip install" in text and name not in ("", *HOSTILE[:4])) or f"({name})" not in text


@pytest.mark.parametrize("name", HOSTILE[:8], ids=range(8))
def test_a_class_of_another_name_is_not_loaded(name: str) -> None:
    """A name in a config is code in the card only if transformers has it."""
    facts = replace(merged_facts("plain"), model=name)
    assert "from_pretrained" not in merged_card(facts, STATED)[0]
    known = replace(facts, model="LlamaForCausalLM")
    assert 'LlamaForCausalLM.from_pretrained("plain")' in merged_card(known, STATED)[0]
    assert "from_pretrained" in merged_card(replace(known, name=name), STATED)[0]
    assert name not in merged_card(replace(known, name=name), STATED)[0].split("```python")[1]


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """The factors of a LoRA."""
    return {"A": torch.zeros(2, 3), "B": torch.zeros(4, 2)}


@pytest.mark.slow
@settings(max_examples=40)
@given(NAMES, NAMES, st.sampled_from(["LORA", None]))
@example("\n---\nlicense: gpl\n---\n", "a", "LORA")
@example("a", "www.evil.example\n---\n", None)
def test_an_adapter(tensors: dict[str, torch.Tensor], setting: str, module: str, kind: str | None) -> None:
    """A setting, a module's name, and, for a type that graftc does not know, the type itself are anybody's words."""
    module = module.replace(".", "").encode("utf-8", "replace").decode()[:200] or "m"  # what files of tensors may name
    text, metadata = _adapter_card(tensors, setting, module, kind)
    plain, _ = _adapter_card(tensors, "plain", "plain", kind and "LORA")
    require_contained(text, plain)
    require_metadata(text, metadata)


def _adapter_card(tensors: dict[str, torch.Tensor], setting: str, module: str, kind: str | None) -> tuple[str, Any]:
    config = {
        "peft_type": kind or (setting if setting != "LORA" else "OTHER"),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": [module],
        "peft_version": setting,
        "revision": setting,
        "base_model_name_or_path": setting,
        "task_type": setting,
        "auto_mapping": {"base_model_class": setting, "parent_library": setting},
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "adapter")
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        stored = {f"base_model.model.{module}.lora_{part}.weight": own for part, own in tensors.items()}
        save_file(stored, folder / "adapter_model.safetensors")
        return peft_card(peft_facts(folder), STATED)
