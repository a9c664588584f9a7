"""Folders of a kind that a call does not read: the hint names the call that reads them, and that call works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.runtime.sources.folder_kinds import reader_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}
ADAPTER, ARTIFACT, CHECKPOINT = "a PEFT adapter", "a graftc artifact", "a trainer's checkpoint of a compiled model"
PLAIN = "a transformers model without graftc.json, which merged.save writes"
QUANTISED = "a transformers model quantised by gptq"
CALLS = {
    "adapter": (ADAPTER, "graftc.import_peft({path!r}, model)"),
    "artifact": (ARTIFACT, "graftc.load({path!r})"),
    "checkpoint": (CHECKPOINT, "graftc.load({path!r})"),
    "merged": (PLAIN, "graftc.load_base({path!r})"),
    "plain": (PLAIN, "graftc.load_base({path!r})"),
    "gptq": (QUANTISED, "graftc.load_base({path!r})"),
    "aqlm": ("a transformers model quantised by aqlm", "AutoModel.from_pretrained({path!r})"),
    "gguf": (
        "a folder of GGUF files",
        "transformers.AutoModelForCausalLM.from_pretrained({path!r}, gguf_file='m.gguf')",
    ),
    "gguf/m.gguf": (
        "a GGUF file",
        "transformers.AutoModelForCausalLM.from_pretrained({parent!r}, gguf_file='m.gguf')",
    ),
    "adapters": ("a folder of PEFT adapters", "graftc.import_peft({path!r}, model, name='first')"),
    "artifacts": ("a folder of artifacts", "graftc.load({inner!r})"),
    "adapter/adapter_config.json": (f"a file of {ADAPTER}", "graftc.import_peft({parent!r}, model)"),
    "merged/config.json": (f"a file of {PLAIN}", "graftc.load_base({parent!r})"),
    "spec.yaml": ("possibly a spec", "graftc.compile({path!r}, model)"),
}
READS = {
    "load": ("artifact", "checkpoint"),
    "import_peft": ("adapter",),
    "load_base": ("merged", "plain", "gptq"),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def root(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kinds")
    compiled: Any = graftc.compile(SPEC, model).eval()
    compiled.save(root / "artifact", certify=False)
    compiled.export(root / "adapter", format="peft")
    (root / "checkpoint").mkdir()
    from safetensors.torch import save_file

    save_file(compiled.state_dict(), root / "checkpoint/model.safetensors")
    compiled.merge(allow_unchanged=True).save(root / "merged")
    model.save_pretrained(root / "plain")
    for method in ("gptq", "aqlm"):
        shutil.copytree(root / "plain", root / method)
        config = json.loads((root / "plain/config.json").read_text())
        config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 8}
        (root / method / "config.json").write_text(json.dumps(config))
    (root / "gguf").mkdir()
    (root / "gguf/m.gguf").write_bytes(b"GGUF")
    shutil.copytree(root / "adapter", root / "adapters/first")
    shutil.copytree(root / "artifact", root / "artifacts/first")
    (root / "empty").mkdir()
    (root / "spec.yaml").write_text("adapt: []")
    return root


def expected(root: Path, name: str) -> str:
    what, call = CALLS[name]
    path = root / name
    words = {"path": str(path), "parent": str(path.parent), "inner": str(path / "first")}
    return f"it is {what}: {call.format(**words)} reads it"


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_the_kind_is_told(name: str, root: Path) -> None:
    assert reader_of(root / name) == expected(root, name)


@pytest.mark.parametrize("name", ["empty", "nothing", "gguf/none", "\0"])
def test_nothing_is_told_of_what_is_not_known(name: str, root: Path) -> None:
    assert reader_of(root / name) is None


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("function", READS)
def test_the_hint_names_the_call_that_reads_it(function: str, name: str, root: Path, model: nn.Module) -> None:
    if name in READS[function]:
        return
    call: Callable[[], Any] = {
        "load": lambda: graftc.load(root / name),
        "import_peft": lambda: graftc.import_peft(root / name, model),
        "load_base": lambda: graftc.load_base(root / name),
    }[function]
    with pytest.raises(GraftError) as caught:
        call()
    error = caught.value
    known = function == "import_peft" and name == "adapters"  # names the adapters inside
    if function == "load_base" and name in ("aqlm", "adapter", "adapters", "artifacts"):
        assert error.code in ("GC032", "GC161")
        return
    assert error.code == {"load": "GC080", "import_peft": "GC110", "load_base": "GC032"}[function]
    assert error.hint == ("name one of its adapters: first" if known else expected(root, name))


@pytest.mark.full
def test_the_call_that_is_named_reads_it(root: Path, model: nn.Module) -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    before = model(input_ids=ids).logits
    for folder in ("merged", "plain"):
        assert torch.equal(graftc.load_base(root / folder)(input_ids=ids).logits, before)
    for compiled in (
        graftc.load(root / "artifact", model),
        graftc.load(root / "checkpoint", model),
        graftc.import_peft(root / "adapter", model),
    ):
        assert torch.equal(compiled.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"artifact": 3}', '{"quantization_config": []}', "[" * 5000])
def test_files_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    for name in ("config.json", "manifest.json"):
        (tmp_path / name).write_text(content)
    assert reader_of(tmp_path) == f"it is {PLAIN}: graftc.load_base({str(tmp_path)!r}) reads it"
