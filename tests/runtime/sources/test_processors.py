"""Folders with a processor, which makes the example inputs of a model of text and images if none are given."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.sources.models import load_folder
from graftc.runtime.sources.processors.example import processor_example
from graftc.specs.errors.diagnostics import GraftWarning
from graftc.testing.families import tiny

pytestmark = pytest.mark.slow

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.{q,v}"}}]}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:", "What", "is", "this?", "w"]
IMAGE, PATCHES = 4, 16
TEMPLATE = (
    "{% for m in messages %}{{ m.role.upper() }}: {% for part in m.content %}{% if part.type == 'image' %}<image> "
    "{% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with its processor, as a trainer saves them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **special)
    text = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4}
    config = LlavaConfig(
        text_config={**text, **heads, "num_key_value_heads": 2, "vocab_size": len(WORDS)},
        vision_config={**vision, **heads, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    path = tmp_path_factory.mktemp("processors") / "llava"
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.mark.full
def test_both_towers_are_adapted_without_a_batch(folder: Path) -> None:
    model = load_folder(folder)
    shown = processor_example(model)
    assert shown is not None and shown.keys() == {"input_ids", "attention_mask", "pixel_values"}
    assert (shown["input_ids"] == IMAGE).sum(1).tolist() == [PATCHES, PATCHES]
    with torch.no_grad():
        model(**shown)
    compiled = graftc.compile(SPEC, model)
    paths = {site.key.module for item in compiled.compilation.main.resolved for site, _ in item.places}
    assert sum(".vision_tower." in path for path in paths) == sum(".language_model." in path for path in paths) == 6


@pytest.mark.full
def test_roles_behind_the_tokens_that_features_are_put_among(folder: Path) -> None:
    report = graftc.roles(load_folder(folder))
    norms = {finding.parameter for finding in report.findings if finding.role == "norm"}
    assert {f"model.language_model.layers.{layer}.input_layernorm.weight" for layer in range(3)} <= norms
    assert [finding.parameter for finding in report.findings if finding.role == "head"] == ["lm_head.weight"]


@pytest.mark.full
def test_a_stack_that_no_input_calls_is_reported(folder: Path) -> None:
    text = {"input_ids": torch.randint(5, 9, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    report = graftc.check(SPEC, load_folder(folder), text)
    assert {each.stack.split(".")[1]: each.level for each in report.stacks} == {
        "vision_tower": "none",
        "language_model": "graph",
    }
    assert report.stacks[0].reason == "the inputs shown do not call it"
    assert graftc.check(SPEC, load_folder(folder, meta=True)).stacks == report.stacks


@pytest.mark.full
@pytest.mark.sample("missing")
@pytest.mark.parametrize(
    "template",
    [None, "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}", "{{ x("],
    ids=["missing", "endless", "broken"],
)
def test_a_template_that_is_missing_or_hostile_is_left_out(folder: Path, tmp_path: Path, template: str | None) -> None:
    other = shutil.copytree(folder, tmp_path / "llava")
    (other / "chat_template.jinja").unlink()
    if template is not None:
        (other / "chat_template.jinja").write_text(template)
    shown = processor_example(load_folder(other))
    assert shown is not None and (shown["input_ids"] == IMAGE).sum(1).tolist() == [PATCHES, PATCHES]


@pytest.mark.full
@pytest.mark.parametrize(
    "broken",
    [
        "not JSON",
        *(pytest.param(text, marks=pytest.mark.full) for text in ('{"processor_class": "NoProcessor"}', "[]")),
    ],
)
def test_a_broken_processor_is_a_warning(folder: Path, tmp_path: Path, broken: str) -> None:
    other = shutil.copytree(folder, tmp_path / "llava")
    (other / "processor_config.json").write_text(broken)
    (other / "tokenizer.json").write_text("{}")
    with pytest.warns(GraftWarning, match="GC183.*cannot make an example") as told:
        assert processor_example(load_folder(other)) is None
    assert len(told) == 1


@pytest.mark.full
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_additional_image_tokens": 10**8},
        pytest.param(
            {"image_processor": {"size": {"shortest_edge": 9000}, "crop_size": {"height": 9000, "width": 9000}}},
            marks=pytest.mark.full,
        ),
        pytest.param(
            {"image_processor": {"size": {"shortest_edge": 10**7}, "crop_size": {"height": 10**7, "width": 10**7}}},
            marks=pytest.mark.full,
        ),
    ],
)
def test_sizes_that_take_all_memory_are_a_warning(folder: Path, tmp_path: Path, sizes: dict[str, Any]) -> None:
    other = shutil.copytree(folder, tmp_path / "llava")
    described = json.loads((other / "processor_config.json").read_text())
    for name, value in sizes.items():
        described[name] = {**described[name], **value} if isinstance(value, dict) else value
    (other / "processor_config.json").write_text(json.dumps(described))
    with pytest.warns(GraftWarning, match=r"GC183.*cannot make an example"):
        assert processor_example(load_folder(other)) is None


@pytest.mark.full
def test_code_of_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "llava")
    described = json.loads((other / "processor_config.json").read_text())
    described["auto_map"] = {"AutoProcessor": "own.Own"}
    described["processor_class"] = "Own"
    (other / "processor_config.json").write_text(json.dumps(described))
    (other / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftWarning)
        processor_example(load_folder(other))
    assert not (tmp_path / "ran").exists()


def test_models_of_text_alone_ask_no_processor(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "preprocessor_config.json").write_text("{")
    assert processor_example(load_folder(tmp_path / "bert")) is None
    assert processor_example(tiny("bert")) is None
