"""GGUF adapters, model folders, folders for ONNX Runtime GenAI, and what an adapter brings beside its factors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import graftc
from graftc.applications.serving.bases import ServedBase
from graftc.applications.serving.gguf_files import gguf_updates
from graftc.records.serving.certificates import ServingCertificate, ServingRun
from graftc.runtime.onnx_generation.genai import genai_config
from graftc.runtime.onnx_generation.io_names import PAIR
from tests.applications.serving.peft_folders import changed, peft_folder, saved_base, shapes_of
from tests.applications.serving.seeded_folders import draft, write_gguf

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_base(tmp_path_factory.mktemp("bases") / "base")


def adapter_file(file: Path, tensors: Mapping[str, tuple[int, int]], arch: str = "llama", **fields: Any) -> Path:
    """Write a GGUF adapter with tensors of ones or `fill`, and fields that are floats unless they are integers."""
    fill = fields.pop("fill", 1.0)
    writer = gguf.GGUFWriter(file, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", fields.pop("type", "lora"))
    for key, value in {"adapter.lora.alpha": 4.0, **fields}.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.full(shape, fill, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


V = {"blk.0.attn_v.weight.lora_a": (2, 32), "blk.0.attn_v.weight.lora_b": (16, 2)}
TABLE = {"token_embd.weight.lora_a": (96, 2), "token_embd.weight.lora_b": (32, 2)}
HEAD = {"output.weight.lora_a": (2, 32), "output.weight.lora_b": (96, 2)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tensors", "options", "kind", "words"),
    [
        (V, {"arch": "qwen2"}, "refused", "general.architecture is 'qwen2'"),
        (V, {"type": "loha"}, "refused", "adapter.type is 'loha'"),
        (V, {"adapter.lora.alpha": 4}, "refused", "UINT32, which ends llama.cpp"),
        (V, {"adapter.lora.alpha": 0.0}, "wrong", "multiplies by 1 instead of alpha"),
        (V, {"adapter.lora.alpha": float("nan")}, "wrong", "adapter.lora.alpha is nan"),
        (V, {"fill": float("inf")}, "wrong", "contain NaN or infinity"),
        (V, {"adapter.lora.dora": 1}, "ignored", "adapter.lora.dora is 1"),
        (dict(list(V.items())[:1]), {}, "refused", "only one of lora_a and lora_b"),
        ({name.replace("blk.0", "blk.9"): shape for name, shape in V.items()}, {}, "refused", "not a matrix"),
        ({**V, "blk.0.attn_v.weight.lora_b": (32, 2)}, {}, "refused", "maps 32 to 16"),
        ({**V, "blk.0.attn_norm.weight": (1, 32)}, {}, "ignored", "ignores blk.0.attn_norm.weight"),
        ({**V, "blk.0.attn_v.bias": (1, 16)}, {}, "refused", "is not a factor"),
        ({**V, **TABLE}, {}, "refused", "aborts at the first request"),
        ({**V, **HEAD}, {}, "refused", "has no such tensor"),
    ],
)
def test_gguf_adapters(
    base: Path, tmp_path: Path, tensors: dict[str, tuple[int, int]], options: dict[str, Any], kind: str, words: str
) -> None:
    file = adapter_file(tmp_path / "adapter.gguf", tensors, **options)
    certificate = graftc.serve_check(file, "llama.cpp", base=base)
    assert not certificate.passed
    assert [(problem.kind, words in problem.reason) for problem in certificate.problems] == [(kind, True)]


@pytest.mark.slow
def test_a_good_gguf_adapter(base: Path, tmp_path: Path) -> None:
    """Factors of an embedding and a head are for bases that have both; the updates are those that were written."""
    file = adapter_file(tmp_path / "v.gguf", V)
    certificate = graftc.serve_check(file, "llama.cpp", base=base)
    assert certificate.passed and (certificate.applied, certificate.total) == (2, 2)
    assert [(site.site, site.rank, site.scale) for site in certificate.sites] == [("blk.0.attn_v.weight", 2, 2.0)]
    apart = saved_base(tmp_path / "apart", tie_word_embeddings=False)
    file = adapter_file(tmp_path / "tables.gguf", {**TABLE, **HEAD})
    assert graftc.serve_check(file, "llama.cpp", base=apart).passed
    adapter = draft(7, shapes_of(base), fused=True)
    updates = gguf_updates(write_gguf(adapter, tmp_path / "drawn.gguf"), ServedBase.of(base))
    assert updates.keys() == adapter.updates.keys()
    for name, update in adapter.updates.items():
        assert torch.allclose(updates[name], update, atol=1e-5, rtol=1e-5), name


@pytest.mark.slow
def test_model_folders(base: Path, tmp_path: Path) -> None:
    for engine in ("vllm", "sglang"):
        assert graftc.serve_check(base, engine).passed
    own, file = saved_base(tmp_path / "own"), tmp_path / "own" / "config.json"
    assert graftc.serve_check(own, "mistralrs").passed
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({name: value for name, value in config.items() if name != "rope_theta"}))
    # An adapter is refused as well: the engine does not load the base.
    for folder in (own, peft_folder(own, tmp_path / "adapter")):
        (problem,) = graftc.serve_check(folder, "mistralrs").problems
        assert (problem.kind, problem.place) == ("refused", "rope_theta") and f"to {file}" in problem.remedy
    tensors = load_file(own / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] + 1
    save_file({**tensors, "lm_head.weight": head}, own / "model.safetensors", {"format": "pt"})
    assert [p.place for p in graftc.serve_check(own, "vllm").problems] == ["tie_word_embeddings"]
    changed(own, "config.json", tie_word_embeddings=False)
    assert graftc.serve_check(own, "vllm").passed
    peft_folder(base, own)
    (problem,) = graftc.serve_check(own, "vllm").problems
    assert problem.kind == "ignored" and "adapter_config.json, which transformers would apply" in problem.reason


@pytest.mark.slow
def test_folders_for_genai(base: Path, tmp_path: Path) -> None:
    """Numbers and names in ``genai_config.json`` have to be the model's and the graph's."""
    onnx = pytest.importorskip("onnx")
    folder = saved_base(tmp_path / "genai")
    cache = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *(f"past_key_values.{slot}" for slot in cache)]
    outputs = ["logits", *(f"present.{slot}" for slot in cache)]
    values = [[onnx.helper.make_tensor_value_info(n, 1, None) for n in own] for own in (names, outputs)]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", *values)), folder / "model.onnx")
    (folder / "genai_config.json").write_text("{}")
    assert [p.kind for p in graftc.serve_check(folder, "genai").problems] == ["refused"]
    model: Any = ServedBase.of(base).model
    written: Any = genai_config(model.config, None, "model.onnx", names, outputs)
    (folder / "genai_config.json").write_text(json.dumps(written))
    assert graftc.serve_check(folder, "genai").passed
    for place, value in (("num_key_value_heads", 4), ("head_size", 4), ("inputs", {"input_ids": "tokens"})):
        other = json.loads(json.dumps(written))
        other["model"]["decoder"][place] = value
        (folder / "genai_config.json").write_text(json.dumps(other))
        problems = graftc.serve_check(folder, "genai").problems
        assert [(p.kind, p.place) for p in problems] == [("wrong", f"model.decoder.{place}")]


@pytest.mark.parametrize("names", [("model.onnx",), PAIR])
def test_graphs_without_a_config_for_genai(tmp_path: Path, names: tuple[str, ...]) -> None:
    """A folder of graphs whose model the engine does not know is not taken for something else."""
    onnx = pytest.importorskip("onnx")
    transformers.GPT2Config().save_pretrained(tmp_path)
    for name in names:
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / name)
    certificate = graftc.serve_check(tmp_path, "genai")
    (problem,) = certificate.problems
    assert certificate.form == "onnx-generate" and problem.kind == "refused"
    assert problem.reason == "onnxruntime-genai does not know models of type gpt2"
    (other,) = graftc.serve_check(tmp_path, "vllm").problems
    assert "does not load an ONNX folder for generation" in other.reason
    transformers.LlamaConfig(num_hidden_layers=0).save_pretrained(tmp_path)
    (problem,) = graftc.serve_check(tmp_path, "genai").problems
    assert problem.reason in ("the graph has no logits", "the folder has no genai_config.json")


@pytest.mark.slow
def test_a_copy_of_a_table(base: Path, tmp_path: Path) -> None:
    """An adapter's copy of the embedding is not read: it has to be the base's own."""
    folder = peft_folder(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "embed_tokens"])
    assert graftc.serve_check(folder, "vllm").passed
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = (name for name in tensors if name.endswith("embed_tokens.base_layer.weight"))
    save_file({**tensors, key: tensors[key] + 1}, file)
    certificate = graftc.serve_check(folder, "vllm")
    assert [(problem.kind, problem.place) for problem in certificate.problems] == [("ignored", key)]
    assert [tensor.name for tensor in certificate.tensors if not tensor.applied] == [key]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("sglang", {"target_modules": r".*\.(q|v)_proj"}, "regular expression"),
        ("vllm", {"new_option": True}, "new_option is true, which is not known to have no effect"),
        ("vllm", {"velora_config": {"rank": 1}}, "velora_config"),
        ("vllm", {"r": None}, "r is null"),
        ("mistralrs", {"exclude_modules": ["q_proj"]}, "does not select"),
    ],
)
def test_fields(base: Path, tmp_path: Path, name: str, fields: dict[str, Any], words: str) -> None:
    folder = changed(peft_folder(base, tmp_path / "adapter"), **fields)
    certificate = graftc.serve_check(folder, name)
    assert not certificate.passed and any(words in problem.reason for problem in certificate.problems)


def test_a_run_that_proves_nothing() -> None:
    """A certificate passes with a run only if every prompt is equal, and the adapter changes one."""
    common: dict[str, Any] = {"engine": "vllm", "read": "vLLM 0", "read_on": "", "form": "peft", "base": None}
    common |= {"tensors": (), "sites": (), "problems": (), "needs": None}
    for equal, changes, passed in ((5, 5, True), (5, 0, False), (4, 5, False)):
        run = ServingRun("1", 5, 16, equal, changes, None if equal == 5 else 3)
        assert ServingCertificate(**common, run=run).passed is passed
