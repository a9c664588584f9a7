"""Untrusted model folders: loaded as transformers loads them, or soon refused with a coded error."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftc
from graftc.applications.chat.opening import open_text_model
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.foreign_folders import require_regular_files
from graftc.runtime.sources.models import load_model, quiet_transformers
from graftc.runtime.streaming.peft import peft_updates
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.regular_files import JSON_BYTES
from graftc.testing.families import tiny
from tests.kit.comparing import same_tensors
from tests.kit.refusals import refused
from tests.runtime.streaming.support import sharded_base, tensors, written_lora

INDEX = "model.safetensors.index.json"
Change = Callable[[Path, dict[str, Any]], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one file, another in several files, and a GPT-2."""
    folder = tmp_path_factory.mktemp("models")
    sharded_base(folder / "shards", dtype=torch.float32)
    with quiet_transformers():
        tiny("llama").save_pretrained(folder / "single")
        tiny("gpt2").save_pretrained(folder / "gpt2")
    return folder


def copied(saved: Path, name: str, to: Path, change: Change) -> Path:
    """Copy a folder and change its config, or other files."""
    shutil.copytree(saved / name, to)
    config = json.loads((to / "config.json").read_text())
    change(to, config)
    if (to / "config.json").is_file() and (to / "config.json").stat().st_size < 10**6:
        (to / "config.json").write_text(json.dumps(config))
    return to


def unreadable(folder: Path, read: Callable[[Path], Any] = lambda folder: load_model(str(folder))) -> GraftError:
    """Return the error, which must come within two seconds and 300 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(read, folder, seconds=2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
    return error


def _config(**changes: Any) -> Change:
    return lambda folder, config: config.update(changes)


def _whole(text: bytes) -> Change:
    def change(folder: Path, config: dict[str, Any]) -> None:
        (folder / "config.json").write_bytes(text + b" " * 10**6)

    return change


def _sparse(folder: Path, config: dict[str, Any]) -> None:
    os.truncate(folder / "config.json", 20 * 2**30)


CONFIGS: dict[str, Change] = {
    "architectures of numbers": _config(architectures=[5]),
    "architectures of lists": _config(architectures=[["LlamaModel"]]),
    "architectures of a text": _config(architectures="LlamaModel"),
    "architectures of a table": _config(architectures={"a": 1}),
    "no architectures": _config(architectures=[]),
    "a billion layers": _config(num_hidden_layers=10**9),
    "a million layers": _config(num_hidden_layers=10**6),
    "ten thousand layers": _config(num_hidden_layers=10**4),
    "three hundred layers": _config(num_hidden_layers=300),
    "a billion labels": _config(num_labels=10**9),
    "a vocabulary of ten million": _config(vocab_size=10**7),
    "a vocabulary of 2**60": _config(vocab_size=2**60),
    "ten million neurons": _config(intermediate_size=10**7),
    "a width of 2**20": _config(hidden_size=2**20),
    "no heads": _config(num_attention_heads=0),
    "a type that is none": _config(model_type="none"),
    "an activation that is none": _config(hidden_act="none"),
    "integers": _config(dtype="int8"),
    "a method of a list": _config(quantization_config={"quant_method": ["x"]}),
    "quantised by a number": _config(quantization_config=7),
    "deep": _whole(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a list": _whole(b"[]"),
    "nothing": _whole(b""),
    "many values": _whole(b'{"a":[' + b"1," * 2_000_000 + b"1]}"),
    "sparse, of 20 GB": _sparse,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    folder = copied(saved, "single", tmp_path / "model", CONFIGS[name])
    assert unreadable(folder).code in ("GC032", "GC161")


@pytest.mark.parametrize("positions", [10**7, 10**12])
def test_positions_that_the_files_do_not_have(saved: Path, tmp_path: Path, positions: int) -> None:
    folder = copied(saved, "gpt2", tmp_path / "model", _config(n_positions=positions))
    assert unreadable(folder).code == "GC032"


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2000, 10**9])
def test_a_model_without_weights_has_bounds_too(saved: Path, tmp_path: Path, layers: int) -> None:
    folder = copied(saved, "single", tmp_path / "model", _config(num_hidden_layers=layers))
    if layers > 10**5:
        assert unreadable(folder, lambda folder: load_model(str(folder), meta=True)).code == "GC032"
    else:
        assert len(load_model(str(folder), meta=True).model.layers) == layers


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("part", ["self_attn.q_proj.weight", "norm.weight", "embed_tokens.weight"])
def test_types_that_are_not_weights(saved: Path, tmp_path: Path, kind: torch.dtype, part: str) -> None:
    def change(folder: Path, config: dict[str, Any]) -> None:
        state = load_file(folder / "model.safetensors")
        state = {name: (t * 9).to(kind) if name.endswith(part) else t for name, t in state.items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    error = unreadable(copied(saved, "single", tmp_path / "model", change))
    assert error.code == "GC032" and part in error.message


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_types_that_are_weights(saved: Path, tmp_path: Path, kind: torch.dtype) -> None:
    def change(folder: Path, config: dict[str, Any]) -> None:
        state = {name: t.to(kind) for name, t in load_file(folder / "model.safetensors").items()}
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    folder = copied(saved, "single", tmp_path / "model", change)
    expected = tiny("llama").from_pretrained(folder).state_dict()
    actual = load_model(str(folder)).state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_weights_of_eight_bits_beside_scales_need_the_config_that_says_so(saved: Path, tmp_path: Path) -> None:
    def change(folder: Path, config: dict[str, Any]) -> None:
        state = load_file(folder / "model.safetensors")
        name = next(name for name in state if name.endswith("q_proj.weight"))
        state[name] = state[name].to(torch.float8_e4m3fn)
        save_file({**state, f"{name}_scale_inv": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})

    assert unreadable(copied(saved, "single", tmp_path / "model", change)).code == "GC032"


# --- one source of weights ----------------------------------------------------------------------------------------


def _shards_gone(folder: Path) -> None:
    for file in folder.glob("model-*.safetensors"):
        file.unlink()


BESIDE: dict[str, Callable[[Path], object]] = {
    "shards": lambda folder: None,
    "an index alone": _shards_gone,
    "an index of nothing": lambda folder: (folder / INDEX).write_text('{"metadata": {}, "weight_map": {}}'),
    "a damaged index": lambda folder: (folder / INDEX).write_text("{"),
}
"""Other contents of a folder with a single file, which comes first."""


def _both(saved: Path, to: Path, beside: str) -> Path:
    """Create a folder with shards and their index, and another model in a single file."""
    folder = copied(saved, "shards", to, lambda folder, config: None)
    state = load_file(saved / "single" / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"})
    BESIDE[beside](folder)
    return folder


@pytest.mark.parametrize("beside", BESIDE)
def test_a_single_file_comes_before_an_index(saved: Path, tmp_path: Path, beside: str) -> None:
    folder = _both(saved, tmp_path / "model", beside)
    theirs = tiny("llama").from_pretrained(folder).state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in load_model(str(folder)).state_dict().items())
    with TensorFolder(folder) as stored:
        assert stored.index is None and all(torch.equal(tensor, theirs[name]) for name, tensor in stored.items())


@pytest.mark.slow
@pytest.mark.parametrize("beside", BESIDE)
def test_a_streamed_merge_reads_what_the_loader_reads(saved: Path, tmp_path: Path, beside: str) -> None:
    folder = _both(saved, tmp_path / "model", beside)
    written_lora(tmp_path / "adapter", saved / "single")
    graftc.merge_checkpoint(tmp_path / "adapter", folder, tmp_path / "out")
    shutil.copytree(folder, tmp_path / "alone", ignore=shutil.ignore_patterns("model-*", INDEX))
    graftc.merge_checkpoint(tmp_path / "adapter", tmp_path / "alone", tmp_path / "other")
    mine, theirs = tensors(tmp_path / "out"), tensors(tmp_path / "other")
    assert same_tensors(mine, theirs)
    assert not (tmp_path / "out" / INDEX).exists()


@pytest.mark.parametrize(
    "name", ["../away.safetensors", "{0}/away.safetensors", "sub/away.safetensors", "link", "x" * 300]
)
def test_no_loader_follows_an_index_out_of_its_folder(saved: Path, tmp_path: Path, name: str) -> None:
    def change(folder: Path, config: dict[str, Any]) -> None:
        index = json.loads((folder / INDEX).read_text())
        first = sorted(set(index["weight_map"].values()))[0]
        (folder / "sub").mkdir()
        shutil.copyfile(folder / first, folder / "sub" / "away.safetensors")
        (folder / first).rename(tmp_path / "away.safetensors")
        (folder / "link.safetensors").symlink_to(tmp_path / "away.safetensors")
        other = name.format(tmp_path) + ".safetensors"
        index["weight_map"] = {key: other if file == first else file for key, file in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))

    folder = copied(saved, "shards", tmp_path / "model", change)
    written_lora(tmp_path / "adapter", saved / "single")
    assert unreadable(folder).code == "GC101"
    assert unreadable(folder, graftc.load_base).code == "GC101"
    merge = unreadable(folder, lambda base: graftc.merge_checkpoint(tmp_path / "adapter", base, tmp_path / "out"))
    assert merge.code == "GC101" and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "name"), [("single", "model.safetensors"), ("shards", INDEX), ("gpt2", "config.json")]
)
def test_links_in_a_circle_are_missing_files(saved: Path, tmp_path: Path, folder: str, name: str) -> None:
    model = copied(saved, folder, tmp_path / "model", lambda folder, config: None)
    (model / name).unlink()
    (model / name).symlink_to(name)
    assert unreadable(model).code == "GC032"
    written_lora(tmp_path / "adapter", saved / "single")
    merge = unreadable(model, lambda base: graftc.merge_checkpoint(tmp_path / "adapter", base, tmp_path / "out"))
    assert merge.code in ("GC032", "GC100") and not (tmp_path / "out").exists()


def test_an_adapter_inside_a_model_is_refused(saved: Path, tmp_path: Path) -> None:
    """transformers would apply it to the model, and a merge of files would not."""
    folder = copied(saved, "single", tmp_path / "model", lambda folder, config: None)
    written_lora(tmp_path / "adapter", folder)
    for file in (tmp_path / "adapter").iterdir():
        shutil.copyfile(file, folder / file.name)
    assert unreadable(folder).code == "GC032"
    merge = unreadable(folder, lambda base: graftc.merge_checkpoint(tmp_path / "adapter", base, tmp_path / "out"))
    assert merge.code == "GC100"


# --- tensors that are missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["model.norm.weight", "model.layers.1.", "model.embed_tokens.weight", "q_proj"])
def test_no_text_of_random_weights(saved: Path, tmp_path: Path, gone: str) -> None:
    def change(folder: Path, config: dict[str, Any]) -> None:
        state = load_file(folder / "model.safetensors")
        state = {name: tensor for name, tensor in state.items() if gone not in name}
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    folder = copied(saved, "single", tmp_path / "model", change)
    error = unreadable(folder, open_text_model)
    assert error.code == "GC089" and "lacks" in error.message


# --- adapters ------------------------------------------------------------------------------------------------------


def _adapter_file(folder: Path, text: bytes) -> None:
    (folder / "adapter_config.json").write_bytes(text)


ADAPTERS: dict[str, Callable[[Path], object]] = {
    "sparse, of 20 GB": lambda folder: os.truncate(folder / "adapter_config.json", 20 * 2**30),
    "a named pipe": lambda folder: (
        (folder / "adapter_config.json").unlink(),
        os.mkfifo(folder / "adapter_config.json"),
    ),
    "targets that are null": lambda folder: _adapter_file(folder, _with(folder, target_modules=None)),
    "deep": lambda folder: _adapter_file(folder, b'{"peft_type":' * 100_000 + b"1" + b"}" * 100_000),
    "a long pattern": lambda folder: _adapter_file(folder, _with(folder, target_modules="a" * 1_000_000)),
    "a long pattern of choices": lambda folder: _adapter_file(folder, _with(folder, target_modules="(a|b)*" * 100_000)),
    "a long pattern of layers": lambda folder: _adapter_file(
        folder, _with(folder, layers_to_transform=[0], layers_pattern="a" * 1_000_000)
    ),
    "many patterns of ranks": lambda folder: _adapter_file(
        folder, _with(folder, rank_pattern={f"(a|b){n}": 4 for n in range(100_000)})
    ),
    "many targets": lambda folder: _adapter_file(
        folder, _with(folder, target_modules=[f"m{n}" for n in range(300_000)])
    ),
    "many values": lambda folder: _adapter_file(folder, b'{"peft_type":"LORA","r":[' + b"1," * 4_000_000 + b"1]}"),
}


def _with(folder: Path, **changes: Any) -> bytes:
    return json.dumps({**json.loads((folder / "adapter_config.json").read_text()), **changes}).encode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_that_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    folder = written_lora(tmp_path / "adapter", saved / "single")
    ADAPTERS[name](folder)
    if not (folder / "adapter_config.json").is_file():
        assert unreadable(folder, lambda folder: graftc.import_peft(folder, tiny("llama"))).code == "GC110"
    else:
        error = unreadable(folder, lambda folder: peft_updates(folder, TensorFolder(saved / "single")))
        assert error.code in ("GC008", "GC009", "GC111", "GC112", "GC113", "GC114")


def test_files_that_nobody_reads_may_be_large(tmp_path: Path) -> None:
    for name in ("trainer_state.json", "data.json"):
        (tmp_path / name).write_bytes(b" " * (JSON_BYTES + 1))
    require_regular_files(tmp_path, "GC144")
    (tmp_path / "model.safetensors.index.json").write_bytes(b" " * (JSON_BYTES + 1))
    require_regular_files(tmp_path, "GC144")
    (tmp_path / "tokenizer_config.json").write_bytes(b" " * (JSON_BYTES + 1))
    with pytest.raises(GraftError, match="tokenizer_config"):
        require_regular_files(tmp_path, "GC144")
