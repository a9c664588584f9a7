"""The committed coverage list and the tool that generates it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import unittest
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import graftc
from tools.coverage import examine, page, run
from tools.coverage.build import Built, build
from tools.coverage.catalogue import Entry, entries
from tools.coverage.diffusion import diffusion_model
from tools.coverage.inputs import BATCH, running
from tools.coverage.levels import KINDS, LEVELS, called_maps, compile_maps, levels
from tools.coverage.page_levels import level_counts
from tools.coverage.shrink import VOCABULARY, Plan, shrink
from tools.coverage.text import clean
from tools.sources import ROOT

DOCS = ROOT / "docs"
AGAIN = ("BertForSequenceClassification", "GPT2LMHeadModel", "ViTForImageClassification")


@cache
def committed() -> dict[str, Any]:
    data: dict[str, Any] = json.loads((DOCS / "coverage.json").read_text(encoding="utf-8"))
    return data


def records() -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = committed()["records"]
    return listed


def same_versions(*names: str) -> None:
    """Skip the test if the installed versions differ from those that the list was made with."""
    recorded, installed = committed()["made"]["versions"], run.versions()
    for name in names:
        if recorded[name] != installed[name]:
            raise unittest.SkipTest(f"the list was made with {name} {recorded[name]}, here is {installed[name]}")


# --- the committed list ---------------------------------------------------------------------------------


def test_page_is_the_rendering_of_the_json() -> None:
    assert (DOCS / "coverage.md").read_text(encoding="utf-8") == page.render(
        (DOCS / "coverage.json").read_text("utf-8")
    )


def test_json_is_in_its_canonical_form() -> None:
    text = (DOCS / "coverage.json").read_text(encoding="utf-8")
    assert text == page.to_json(reversed(records()), committed()["made"]["versions"])


def test_every_entry_of_the_installed_tables_is_in_the_list() -> None:
    same_versions(*run.LIBRARIES)
    listed = {(table, record["class"]) for record in records() for table in record["tables"]}
    assert listed == {(table, entry.name) for entry in entries() for table in entry.tables}


def test_enough_architectures_are_built_and_nearly_all_with_attention_fold() -> None:
    count = page.totals(record for record in records() if record["model_type"])
    assert count["built"] >= 500
    assert count["attention"] >= 400
    assert count["folds"] >= 0.95 * count["attention"]


def test_nearly_all_that_are_built_are_graphs_of_layers_or_better() -> None:
    count = level_counts(records())
    assert count["built"] >= 700
    assert count["graph"] + count["layers"] >= 0.97 * count["built"]
    assert count["refused"] <= 0.01 * count["built"]


def test_each_class_that_is_built_has_a_level_or_a_refusal() -> None:
    for record in records():
        assert (record.get("level") in LEVELS) is (record["built"] and not record.get("refused")), record
        stacks = record.get("stacks", {})
        assert set(stacks.values()) <= {*LEVELS, "none"}, record
        assert not stacks or stacks[record["main"]] == record["level"], record
        if record["built"] and record.get("level") != "graph":
            assert record.get("reason") or record.get("refused") or record.get("in_the_way"), record


def test_whatever_did_not_come_through_has_a_reason() -> None:
    for record in records():
        stopped = not record["built"] or not record["captured"] or record.get("folds") is False
        assert bool(record.get("reason")) is stopped, record
        if record.get("captured"):
            assert record["roles"] is True or record.get("unresolved") or record.get("reason"), record
    assert all(record["reason"] for record in page.exceptions(records()))


def test_what_folds_was_adapted_where_it_had_to_be() -> None:
    for record in records():
        if record.get("folds"):
            assert record["sites"] >= len(record["target"]) > 0, record
            if record["attention"]:
                assert {"attn.q", "attn.v"} <= set(record["target"]), record


@pytest.mark.full
@pytest.mark.parametrize("name", AGAIN)
def test_examining_again_gives_the_committed_record(name: str) -> None:
    same_versions("transformers", "torch")
    entry = next(e for e in entries() if e.name == name)
    fresh = examine.committed(examine.examine(entry, detail=False))
    assert fresh == next(r for r in records() if r["class"] == name)


# --- shrinking ------------------------------------------------------------------------------------------


def test_shrinking_makes_a_llama_small_and_keeps_its_proportions() -> None:
    config = tf.LlamaConfig(num_key_value_heads=8)
    small = shrink(config)
    assert (small.hidden_size, small.num_hidden_layers, small.num_attention_heads) == (64, 2, 4)
    assert small.num_key_value_heads == 2
    assert small.intermediate_size == round(11008 * 64 / 4096 / 8) * 8
    assert small.head_dim * small.num_attention_heads == small.hidden_size
    assert small.vocab_size == VOCABULARY
    assert max(small.bos_token_id, small.eos_token_id, small.pad_token_id) < VOCABULARY
    assert config.hidden_size == 4096


def test_shrinking_keeps_a_layer_of_every_kind() -> None:
    config = tf.Gemma3TextConfig()
    small = shrink(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert len(small.layer_types) == small.num_hidden_layers <= 4


def test_shrinking_reaches_sub_configs_and_keeps_their_widths_equal() -> None:
    small = shrink(tf.CLIPConfig())
    assert small.text_config.hidden_size == small.vision_config.hidden_size == 64
    assert small.vision_config.image_size == 32
    assert small.text_config.num_hidden_layers == small.vision_config.num_hidden_layers == 2


def test_shrinking_keeps_experts_and_their_groups_consistent() -> None:
    small = shrink(tf.DeepseekV3Config())
    assert small.n_routed_experts == 4
    assert small.n_routed_experts % small.n_group == 0
    assert small.num_experts_per_tok <= small.topk_group * small.n_routed_experts // small.n_group
    assert small.qk_head_dim == small.qk_nope_head_dim + small.qk_rope_head_dim


def test_a_plan_without_width_leaves_widths() -> None:
    small = shrink(tf.SwinConfig(), Plan(width=0, fraction=1, image=0))
    assert small.embed_dim == tf.SwinConfig().embed_dim
    assert max(small.depths) <= 2


def test_special_tokens_beyond_the_vocabulary_stay_apart() -> None:
    small = shrink(tf.LlamaConfig(bos_token_id=128000, eos_token_id=[128001, 128009], pad_token_id=128004))
    ids = [small.bos_token_id, *small.eos_token_id, small.pad_token_id]
    assert len(set(ids)) == 4
    assert max(ids) < VOCABULARY


# --- building and inputs --------------------------------------------------------------------------------


def test_models_are_the_same_every_time_and_no_norm_is_the_identity() -> None:
    entry = Entry("LlamaForCausalLM", "llama", ("causal LM",))
    first, second = build(entry), build(entry)
    state = second.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in first.model.state_dict().items())
    norms = [t for name, t in first.model.named_parameters() if "norm" in name]
    assert norms and all(float((t.detach() - 1).abs().max()) > 1e-3 for t in norms)
    assert not first.model.training


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (lambda: tf.BertForMaskedLM(shrink(tf.BertConfig())), ["input_ids", "attention_mask"]),
        (
            lambda: tf.T5ForConditionalGeneration(shrink(tf.T5Config())),
            ["input_ids", "attention_mask", "decoder_input_ids"],
        ),
        (lambda: tf.ViTForImageClassification(shrink(tf.ViTConfig())), ["pixel_values"]),
        (
            lambda: tf.WhisperForConditionalGeneration(shrink(tf.WhisperConfig())),
            ["input_features", "decoder_input_ids"],
        ),
        (lambda: tf.HubertForCTC(shrink(tf.HubertConfig())), ["input_values"]),
    ],
    ids=["text", "two stacks", "image", "log-mel", "samples"],
)
def test_inputs_are_found_from_the_interface(model: Any, names: list[str]) -> None:
    inputs, reason = running(model().eval())
    assert inputs is not None, reason
    assert list(inputs) == names
    assert all(value.shape[0] == BATCH for value in inputs.values())


@pytest.mark.parametrize(
    ("name", "model_type", "places"),
    [
        ("LlavaForConditionalGeneration", "llava", "image_token_id"),
        ("Qwen2VLForConditionalGeneration", "qwen2_vl", "image_token_id"),
        ("VoxtralForConditionalGeneration", "voxtral", "audio_token_id"),
    ],
    ids=["images of one size", "images of several sizes", "sounds"],
)
def test_texts_have_as_many_places_as_the_model_gives_features(name: str, model_type: str, places: str) -> None:
    built = build(Entry(name, model_type, ("multimodal LM",)))
    ids, config = built.inputs["input_ids"], built.model.config
    counts = (ids == getattr(config, places)).sum(-1).tolist()
    assert min(counts) > 0
    if model_type == "qwen2_vl":
        sizes = built.inputs["image_grid_thw"].prod(-1) // 4
        assert counts == sizes.tolist()
        assert len(set(counts)) > 1


def test_maps_with_shared_weights_and_maps_without_gradients_are_left_out() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(16, 8)
            self.inner, self.idle, self.sorts = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.head = torch.nn.Linear(8, 16, bias=False)
            self.head.weight = self.table.weight

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.inner(self.table(input_ids))
            order = self.sorts(hidden).argsort(-1)
            logits: torch.Tensor = self.head(hidden.gather(-1, order))
            return logits

    entry = Entry("Model", "", ("causal LM",))
    model = Model().eval().requires_grad_(False)
    assert called_maps(Built(entry, model, {"input_ids": torch.arange(6)[None]}), KINDS[0]) == ["inner"]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.full
def test_levels_are_those_of_what_compiles() -> None:
    built = build(Entry("Qwen2VLForConditionalGeneration", "qwen2_vl", ("multimodal LM",)))
    summary = levels(compile_maps(built), built)
    assert summary["level"] == "layers"
    assert summary["stacks"]["model.visual.blocks"] == "modules"
    assert summary["main"] == "model.language_model.layers"


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "UNet2DConditionModel", "WanTransformer3DModel"])
def test_inputs_of_diffusion_models_are_found_by_trying(name: str) -> None:
    model, inputs = diffusion_model(name)
    with torch.no_grad():
        model(**inputs)
    assert {"timestep", "encoder_hidden_states"} <= inputs.keys()


@pytest.mark.slow
def test_an_entry_is_captured_once() -> None:
    built = build(Entry("BertForMaskedLM", "bert", ("masked LM",)))
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q"]}, "rank": 2}]}
    with examine._one_capture() as captures:
        structure = graftc.roles(built.model, built.inputs, cache=False)
        compiled = graftc.compile(spec, built.model, built.inputs, cache=False)
    assert len(captures) == 1
    assert len(structure.having("attn.q")) == len(compiled.compilation.main.resolved[0].sites) == 2


# --- records and resuming -------------------------------------------------------------------------------

TINY = [
    Entry("AlbertForMaskedLM", "albert", ("masked LM",)),
    Entry("BertForMaskedLM", "bert", ("masked LM",)),
    Entry("GPT2LMHeadModel", "gpt2", ("causal LM",)),
]


def test_records_of_another_state_or_half_a_file_are_not_used(tmp_path: Path) -> None:
    record = {"class": TINY[0].name, "built": True}
    kept = run.Kept(tmp_path, "now")
    assert kept.read(TINY[0]) is None
    kept.write(TINY[0], record)
    assert kept.read(TINY[0]) == record
    assert run.Kept(tmp_path, "later").read(TINY[0]) is None
    assert run.Kept(tmp_path, "later", any_key=True).read(TINY[0]) == record
    moved = Entry(TINY[0].name, "albert", ("masked LM", "causal LM"))
    assert kept.read(moved) is None
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text()[:-5])
    assert kept.read(TINY[0]) is None


def test_kept_records_are_not_made_again(tmp_path: Path) -> None:
    kept = run.Kept(tmp_path, "now")
    for entry in TINY:
        kept.write(entry, {"class": entry.name, "built": False, "reason": "kept"})
    examined = run.examine_all(TINY, kept, tell=lambda text: None)
    assert [record["reason"] for record in examined.values()] == ["kept"] * 3


@pytest.mark.full
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    names = "|".join(entry.name for entry in TINY)
    command = [sys.executable, "-m", "tools.coverage", "-j", "1", "--only", f"^({names})$", "--work", str(tmp_path)]
    command += ["--any-sources"]  # the sources may be edited during the run
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert first.stdout is not None
    line = first.stdout.readline()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert line.startswith("[1/3]"), line
    done = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 1 <= len(done) < 3
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert second.stdout.startswith(f"{len(done)} of 3 kept from before"), second.stdout
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert len(after) == 3
    assert all(after[name] == time_ for name, time_ in done.items())


@pytest.mark.full
@pytest.mark.slow
def test_an_entry_that_takes_too_long_does_not_take_others_with_it(tmp_path: Path) -> None:
    kept = run.Kept(tmp_path, "now")
    started = time.monotonic()
    examined = run.examine_all(TINY[:2], kept, limits=run.Limits(patience=0), tell=lambda text: None)
    assert time.monotonic() - started < 120
    assert all("takes longer than 0 s" in record["reason"] for record in examined.values())


def test_reasons_are_the_same_on_every_run() -> None:
    first = clean("at 0x7f12: s12 + u3 is wrong in /home/me/lib/x.py\nmore")
    assert first == clean("at 0x8a00: s7 + u11 is wrong in /opt/you/deep/lib/x.py")
    assert len(clean("x" * 999)) == 240
    assert clean("Error for 'x':\n    ValueError: y") == "Error for 'x': ValueError: y"
