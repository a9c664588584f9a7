"""Bad checkpoints and adapters: refused with coded errors that report everything at once, with nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graftc
from graftc.passes.core.weights.folds import WeightFold
from graftc.passes.methods.lora import LoRAMethod
from graftc.runtime.streaming import merging, sites
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.refusals import refused
from tests.runtime.streaming.support import edit_adapter, peft_adapter, sharded_base, tensors, written_lora

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter."""
    folder = tmp_path_factory.mktemp("bad")
    written_lora(folder / "adapter", sharded_base(folder / "base"))
    return folder


@pytest.fixture
def place(intact: Path, tmp_path: Path) -> Path:
    """A copy of both, to be corrupted."""
    shutil.copytree(intact, tmp_path / "place")
    return tmp_path / "place"


def unmerged(place: Path, **options: Any) -> GraftError:
    """Return the error of a merge, after checking that the merge leaves nothing behind."""
    before = sorted(p.name for p in place.iterdir())
    error = refused(graftc.merge_checkpoint, place / "adapter", place / "base", place / "out", **options)
    assert sorted(p.name for p in place.iterdir()) == before
    return error


def edit_index(base: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the files that the index lists."""
    data = json.loads((base / INDEX).read_text())
    change(data["weight_map"])
    (base / INDEX).write_text(json.dumps(data))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "c:x.safetensors"])
def test_names_that_lead_out(place: Path, name: str) -> None:
    edit_index(place / "base", lambda table: table.update({"model.norm.weight": name}))
    error = unmerged(place)
    assert error.code == "GC101"
    assert repr(name) in error.message


def test_links_that_lead_out(place: Path) -> None:
    shard = next(iter(sorted((place / "base").glob("*.safetensors"))))
    shutil.move(shard, place / "elsewhere.safetensors")
    shard.symlink_to(place / "elsewhere.safetensors")
    assert unmerged(place).code == "GC101"


def test_every_missing_file_is_named(place: Path) -> None:
    first, second, *_ = sorted((place / "base").glob("*.safetensors"))
    first.unlink()
    second.unlink()
    error = unmerged(place)
    assert error.code == "GC100"
    assert first.name in error.message and any(second.name in line for line in error.details)


def _cut(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 3)


def _more(shard: Path) -> None:
    with shard.open("ab") as file:
        file.write(b"more")


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(shard: Path) -> None:
        raw = shard.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        data = json.loads(raw[8 : 8 + size])
        change(data)
        text = json.dumps(data).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    return edit


def _first(data: dict[str, Any]) -> dict[str, Any]:
    return next(entry for name, entry in data.items() if name != "__metadata__")


@pytest.mark.parametrize(
    "spoil",
    [
        _cut,
        _more,
        lambda shard: shard.write_bytes(b"\xff" * 64),
        lambda shard: shard.write_bytes(b""),
        _header(lambda data: _first(data).update(dtype="F13")),
        _header(lambda data: _first(data).update(shape=[-1, 4])),
        _header(lambda data: _first(data).update(shape=[2**40, 2**40])),
        _header(lambda data: _first(data)["data_offsets"].reverse()),
        _header(lambda data: _first(data).update(data_offsets=[0, 10**18])),
        _header(lambda data: data.update({"x": 7})),
    ],
)
def test_damaged_files(place: Path, spoil: Callable[[Path], None]) -> None:
    shard = sorted((place / "base").glob("*.safetensors"))[1]
    spoil(shard)
    error = unmerged(place)
    assert error.code == "GC100"
    assert shard.name in error.message


def test_an_index_that_says_otherwise(place: Path) -> None:
    files = sorted(p.name for p in (place / "base").glob("*.safetensors"))
    edit_index(place / "base", lambda table: table.update({"model.norm.weight": files[0], "new.weight": files[1]}))
    error = unmerged(place)
    assert error.code == "GC100"
    assert any("new.weight" in str(line) for line in (error.message, *error.details))


def test_a_name_in_two_files(place: Path) -> None:
    shard = sorted((place / "base").glob("*.safetensors"))[-1]
    duplicate = {"model.embed_tokens.weight": torch.zeros(2, 2)}
    save_file({**duplicate, **dict.fromkeys(())}, place / "base" / "twice.safetensors")
    edit_index(place / "base", lambda table: table.update({"model.norm.weight": "twice.safetensors"}))
    error = unmerged(place)
    assert error.code == "GC100" and shard.is_file()


def test_pickles_are_not_read(place: Path) -> None:
    for file in (place / "base").glob("*.safetensors*"):
        file.unlink()
    (place / "base" / "pytorch_model.bin").write_bytes(b"x")
    assert "pickles" in unmerged(place).hint


@pytest.mark.slow
def test_everything_that_does_not_fit_is_listed(place: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        names = sorted(tensors)
        tensors[names[0]] = torch.zeros(4, 7)
        tensors[names[3]] = torch.zeros(5, 4)
        tensors[names[4]][0, 0] = float("nan")
        tensors[names[6]][1, 1] = float("inf")

    edit_adapter(place / "adapter", spoil)
    error = unmerged(place)
    assert error.code == "GC102"
    lines = [error.message, *map(str, error.details)]
    assert len(lines) == 4
    assert sum("not finite" in line for line in lines) == 2


def test_the_adapter_of_another_base(place: Path) -> None:
    shutil.rmtree(place / "base")
    sharded_base(place / "base", "gpt2")
    error = unmerged(place)
    assert error.code == "GC102"
    assert len(error.details) == 5


@pytest.mark.slow
def test_numbers_in_the_base_that_are_none(place: Path) -> None:
    shard = next(
        file for file in sorted((place / "base").glob("*.safetensors")) if b"layers.0.self_attn.q" in file.read_bytes()
    )
    stored = {name: t for name, t in tensors(place / "base").items() if name.encode() in shard.read_bytes()}
    stored["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("nan")
    save_file(stored, shard, metadata={"format": "pt"})
    error = unmerged(place)
    assert error.code == "GC102"
    assert "q_proj" in error.message


def test_tensors_that_the_files_lack(place: Path) -> None:
    """They are neither in the files nor in the index, and transformers would draw them at random."""
    edit_index(place / "base", lambda table: table.pop("lm_head.weight"))
    files = [file for file in (place / "base").glob("*.safetensors")]
    for file in files:
        kept = {name: tensor for name, tensor in load_file(file).items() if name != "lm_head.weight"}
        file.unlink() if not kept else save_file(kept, file, metadata={"format": "pt"})
    error = unmerged(place)
    assert error.code == "GC100" and "lm_head.weight" in error.message


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_copies_of_tied_tensors(tmp_path: Path, modules: list[str]) -> None:
    """peft trains a copy for one of two modules that share a tensor, but files have only one tensor for both."""
    import peft
    from transformers import AutoModelForCausalLM

    model = tiny("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules)
    adapted = peft.get_peft_model(tied, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    error = unmerged(tmp_path)
    assert error.code in ("GC022", "GC113", "GC114") and ("tied" in error.message or error.code != "GC022")


@pytest.mark.parametrize("kind", ["pissa", "vera"])
def test_what_follows_from_the_model(tmp_path: Path, kind: str) -> None:
    """The file lacks factors that peft computes from the base's weights, or draws."""
    import peft

    base = sharded_base(tmp_path / "base", "llama", torch.float32)
    config = (
        peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
        if kind == "pissa"
        else peft.VeraConfig(r=2, target_modules=["q_proj"], save_projection=False)
    )
    peft_adapter(tmp_path / "adapter", base, config)
    error = unmerged(tmp_path)
    assert error.code == "GC103" and "import-peft" in str(error.hint)


def test_quantised_bases(place: Path) -> None:
    config = json.loads((place / "base" / "config.json").read_text())
    (place / "base" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "x"}}))
    error = unmerged(place)
    assert error.code == "GC103"
    assert "--model" in error.hint


def test_a_narrower_type(place: Path) -> None:
    assert unmerged(place, dtype=torch.float16).code == "GC073"


# --- a folder of peft is checked against its config and the base, as in an import --------------------------------

Spoiling = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"


def _renamed(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    for word in "AB":
        key = FIRST.replace("lora_A", f"lora_{word}")
        tensors[f"{key}.default.weight"] = tensors.pop(f"{key}.weight")


def _other_table(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(101, 48, dtype=torch.bfloat16)


def _more_rows(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(150, 48, dtype=torch.bfloat16)


PEFT: dict[str, tuple[Spoiling, str, str]] = {
    "keys with the adapter's name": (_renamed, "GC113", "self_attn.q_proj"),
    "a norm that no one trains": (
        lambda c, h: h.update({"base_model.model.model.norm.weight": torch.full((48,), torch.nan)}),
        *("GC114", "model.norm.weight has different values"),
    ),
    "a table of another base": (_other_table, "GC114", "embed_tokens.weight has different values"),
    "a table of another size": (
        _more_rows,
        "GC114",
        r"embed_tokens.weight is \[101, 48\], but in the file it is \[150",
    ),
    "a tensor of nothing": (
        lambda c, h: h.update({"base_model.model.junk.weight": torch.ones(2)}),
        "GC113",
        "tensors that LORA does not",
    ),
    "fewer layers": (lambda c, h: c.update(layers_to_transform=[0]), "GC113", "layers.1.* in the file, not selected"),
    "fewer modules": (lambda c, h: c.update(target_modules=["q_proj"]), "GC113", "in the file, not selected"),
    "more modules": (
        lambda c, h: c.update(target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]),
        *("GC113", "k_proj: selected by the config, not in the file"),
    ),
    "no head": (lambda c, h: c.update(modules_to_save=["lm_head"]), "GC113", "lm_head.weight: trained by the config"),
    "no rows": (lambda c, h: c.update(trainable_token_indices=[3]), "GC113", "the file has no rows"),
    "whole numbers": (lambda c, h: h.update({f"{FIRST}.weight": h[f"{FIRST}.weight"].long()}), "GC113", "is I64"),
    "complex numbers": (lambda c, h: h.update({f"{FIRST}.weight": h[f"{FIRST}.weight"] * 1j}), "GC113", "is C64"),
}


@pytest.mark.parametrize(("spoil", "code", "text"), PEFT.values(), ids=PEFT)
def test_a_folder_that_its_config_does_not_explain(place: Path, spoil: Spoiling, code: str, text: str) -> None:
    config = json.loads((place / "adapter" / "adapter_config.json").read_text())
    stored = tensors(place / "adapter")
    spoil(config, stored)
    (place / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(stored, place / "adapter" / "adapter_model.safetensors")
    error = unmerged(place)
    assert error.code == code
    assert re.search(text, "\n".join([error.message, *map(str, error.details)]), re.DOTALL)


@pytest.mark.parametrize("config", ["[" * 100_000, json.dumps({"base_model_name_or_path": "x" * 5_000})])
def test_a_config_that_is_none_without_a_base(place: Path, config: str) -> None:
    (place / "adapter" / "adapter_config.json").write_text(config)
    with pytest.raises(GraftError) as error:
        graftc.merge_checkpoint(place / "adapter", None, place / "out")
    assert error.value.code != "GC099" and not (place / "out").exists()


def _twice(fold: WeightFold) -> WeightFold:
    return WeightFold(lambda w, b: fold.apply(fold.apply(w, b)[0], b))


def _rolled(fold: WeightFold) -> WeightFold:
    return WeightFold(lambda w, b: (fold.apply(w, b)[0].roll(1, -2), b))


def _scaled(fold: WeightFold) -> WeightFold:
    return WeightFold(lambda w, b: (w + (fold.apply(w.clone(), b)[0] - w) * (1 + 1e-6), b))


def _left(fold: WeightFold) -> WeightFold:
    return WeightFold(lambda w, b: (w, b))


def _one_entry(fold: WeightFold) -> WeightFold:
    def apply(w: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        folded, bias = fold.apply(w, b)
        folded[-1, -1] += 1e-5
        return folded, bias

    return WeightFold(apply)


@pytest.mark.full
@pytest.mark.parametrize("wrong", [_twice, _rolled, _scaled, _left, _one_entry])
def test_a_wrong_fold_leaves_nothing_behind(place: Path, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoRAMethod.fold
    monkeypatch.setattr(sites, "BLOCK", 700)
    monkeypatch.setattr(LoRAMethod, "fold", lambda *arguments: wrong(right(*arguments)))
    error = unmerged(place)
    assert error.code == "GC051"
    assert "self_attn" in error.message or "mlp" in error.message


@pytest.mark.slow
def test_a_tensor_that_nothing_folds_into_and_that_changed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftc.runtime.streaming import merging

    create = merging.create_file

    def spoiling(plan: Any, shard: Any, path: Path) -> None:
        create(plan, shard, path)
        stored = shard.tensors.get("model.layers.0.input_layernorm.weight")
        if stored is not None:
            with path.open("r+b") as file:
                file.seek(stored.start)
                file.write(b"\x00\x00")

    monkeypatch.setattr(merging, "create_file", spoiling)
    error = unmerged(place)
    assert error.code == "GC051"
    assert "input_layernorm" in error.message


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut off", "gone", "another", "written to"])
def test_a_base_that_changes_meanwhile(place: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first file is created, a later one is corrupted."""
    right, count = merging.create_file, 0

    def create(plan: Any, shard: Any, path: Path) -> None:
        nonlocal count
        count += 1
        first, _, later, *_ = sorted((place / "base").glob("*.safetensors"))
        if count == 1:
            if how == "cut off":
                os.truncate(later, later.stat().st_size // 2)
            elif how == "gone":
                later.unlink()
            elif how == "another":
                later.write_bytes(first.read_bytes())
            else:
                save_file(load_file(later), later, metadata={"format": "pt"})
        right(plan, shard, path)

    monkeypatch.setattr(merging, "create_file", create)
    error = unmerged(place)
    assert error.code == "GC100" and "changed while it was merged" in error.message
