"""Merging file by file: the same bits as in memory, closer to the exact values than peft, and other rows unchanged."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import graftc
from graftc.runtime.loading.verify import verify
from graftc.runtime.sources.models import load_model
from graftc.runtime.streaming import sites
from graftc.runtime.streaming.verifying import verify_checkpoint
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import perturb
from tests.kit.folders import tree_bytes
from tests.runtime.streaming.support import PROJECTIONS, exact_lora, peft_adapter, sharded_base, tensors, written_lora

ROLES = {"role": ["attn.q", "attn.v", "ffn.down"]}
BLOCKED = 700
"""Entries of a block: most weights of the tiny models have several, of two sizes."""


def merged_both_ways(folder: Path, family: str, dtype: torch.dtype, spec: Any) -> tuple[Path, Path, Any]:
    """Merge an artifact in memory and from its files."""
    base = sharded_base(folder / "base", family, dtype)
    compiled = graftc.compile(spec, load_model(str(base)))
    perturb(compiled)
    compiled.save(folder / "artifact")
    compiled.merge().save(folder / "memory")
    result = graftc.merge_checkpoint(folder / "artifact", None, folder / "files")
    return folder / "memory", folder / "files", result


@pytest.mark.full
@pytest.mark.parametrize(
    "entry", [{"method": "mask", "selection": "random", "density": 0.1}, {"method": "shira", "rank": 2}]
)
def test_entries_of_weights_are_refused(entry: Any, tmp_path: Path) -> None:
    """Updates of single entries are not left out of a merge that has other updates as well."""
    lora = {"method": "lora", "target": {"role": "attn.v"}, "rank": 2}
    spec = {"adapt": [lora, {**entry, "target": {"role": ["attn.q", "ffn.down"]}}]}
    with pytest.raises(GraftError, match="changes single entries") as error:
        merged_both_ways(tmp_path, "llama", torch.float32, spec)
    assert error.value.code == "GC103"


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "dtype", "spec"),
    [
        ("llama", torch.bfloat16, {"adapt": [{"method": "lora", "target": ROLES, "rank": 4}]}),
        (
            "gpt2",
            torch.bfloat16,
            {"adapt": [{"method": "lora", "target": ROLES, "rank": 4}, {"method": "ia3"}], "train": ["**.ln_f"]},
        ),
        ("bert", torch.float16, {"adapt": [{"method": "dora", "target": ROLES, "rank": 4}]}),
        ("bert", torch.float32, {"adapt": [{"method": "lora", "target": {"role": "embed.position"}, "rank": 4}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "lokr", "target": ROLES, "rank": 2}]}),
        ("llama", torch.float32, {"adapt": [{"method": "loha", "target": ROLES, "rank": 2}]}),
        ("llama", torch.bfloat16, {"adapt": [{"method": "oft", "target": ROLES, "block_size": 8}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "boft", "target": ROLES, "factors": 2}]}),
        ("gpt2", torch.bfloat16, {"adapt": [{"method": "c3a", "target": ROLES, "block_size": 4, "init": "xavier"}]}),
        ("gpt2", torch.bfloat16, {"adapt": [{"method": "gralora", "target": ROLES, "rank": 4, "hybrid_rank": 2}]}),
        ("gpt2", torch.bfloat16, {"adapt": [{"method": "hira", "target": ROLES, "rank": 2}]}),
        ("bert", torch.float32, {"adapt": [{"method": "hira", "target": {"role": "embed.position"}, "rank": 4}]}),
        ("llama", torch.bfloat16, {"adapt": [{"method": "ia3"}, {"method": "hira", "target": ROLES, "rank": 4}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "vera", "target": ROLES, "rank": 4}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "miss", "target": ROLES, "rank": 7}]}),
        ("llama", torch.bfloat16, {"adapt": [{"method": "miss", "target": ROLES, "rank": 8, "variant": "bat"}]}),
        ("gpt2", torch.float32, {"adapt": [{"method": "lora", "target": ROLES, "rank": 4, "init": "pissa"}]}),
        ("llama", torch.bfloat16, {"adapt": [{"method": "adalora", "target": ROLES, "rank": 4, "target_rank": 2}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "dylora", "target": ROLES, "rank": 4}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "sora", "target": ROLES, "rank": 4}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "adamix_lora", "target": ROLES, "rank": 4}]}),
        ("bert", torch.bfloat16, {"adapt": [{"method": "bitfit"}]}),
        (
            "gpt2",
            torch.float32,
            {"adapt": [{"method": "lora", "target": {"role": ["ffn.up", "ffn.down"]}, "rank": 4, "bias": "lora_only"}]},
        ),
        ("bert", torch.bfloat16, {"adapt": [{"method": "lora", "target": ROLES, "rank": 4, "bias": "all"}]}),
        ("llama", torch.bfloat16, {"adapt": [{"method": "lora", "target": ROLES, "rank": 4}], "train": ["lm_head"]}),
    ],
    ids=lambda value: value["adapt"][0]["method"] if isinstance(value, dict) else None,
)
def test_the_bits_are_those_of_the_fold_in_memory(
    family: str, dtype: torch.dtype, spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "BLOCK", BLOCKED)
    memory, files, result = merged_both_ways(tmp_path, family, dtype, spec)
    expected, actual, base = tensors(memory), tensors(files), tensors(tmp_path / "base")
    assert actual.keys() == base.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in actual)
    changed = [name for name in actual if not torch.equal(actual[name], base[name])]
    assert changed and result.untouched >= len(actual) - len(changed)
    assert result.certificate.passed and all(site.change > 0 for site in result.certificate.sites)
    told = result.certificate.to_json()  # the whole model was not run, so its outputs are not reported
    assert told["outputs"] == {} and told["budget"] is None and told["largest_difference"] is None
    assert verify(files).passed
    load_model(str(files))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a LoRA for it in peft's format."""
    folder = tmp_path_factory.mktemp("llama")
    written_lora(folder / "adapter", sharded_base(folder / "base"))
    return folder


@pytest.mark.full
def test_a_folder_of_peft_gives_the_bits_of_importing_it(tmp_path: Path) -> None:
    """On a base in 16 bits as well, both fold from the float32 factors of the file."""
    base = sharded_base(tmp_path / "base")
    adapter = written_lora(tmp_path / "adapter", base)
    graftc.merge_checkpoint(adapter, None, tmp_path / "files")
    graftc.import_peft(adapter, load_model(str(base))).merge().save(tmp_path / "memory")
    files, memory = tensors(tmp_path / "files"), tensors(tmp_path / "memory")
    assert all(torch.equal(files[name], tensor) for name, tensor in memory.items())
    assert sum(not torch.equal(memory[name], tensor) for name, tensor in tensors(base).items()) == 6


@pytest.mark.slow
def test_where_peft_differs_the_exact_value_is_nearer(tmp_path: Path) -> None:
    import peft

    base = sharded_base(tmp_path / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=PROJECTIONS)
    model = peft_adapter(tmp_path / "adapter", base, config)
    graftc.merge_checkpoint(tmp_path / "adapter", base, tmp_path / "ours")
    adapter, ours, before = tensors(tmp_path / "adapter"), tensors(tmp_path / "ours"), tensors(base)
    theirs = model.merge_and_unload().state_dict()
    nearer = farther = 0
    for name, tensor in ours.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in PROJECTIONS:
            assert torch.equal(tensor, before[name])
            continue
        exact = exact_lora(before[name], adapter, module, 2.0)
        own, other = (tensor.double() - exact).abs(), (theirs[name].double() - exact).abs()
        nearer += int((own < other).sum())
        farther += int((own > other).sum())
    assert farther == 0
    assert nearer > 0, "nothing tells the two apart"


@pytest.mark.slow
def test_peft_types_merge_as_peft_merges_them(tmp_path: Path) -> None:
    import peft

    base = sharded_base(tmp_path / "base", "gpt2", torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["c_attn", "c_proj"], use_dora=True, rank_pattern={"c_proj": 2},
        modules_to_save=["ln_f"], fan_in_fan_out=True,
    )  # fmt: skip
    model = peft_adapter(tmp_path / "adapter", base, config)
    result = graftc.merge_checkpoint(tmp_path / "adapter", base, tmp_path / "ours")
    theirs, ours = model.merge_and_unload().state_dict(), tensors(tmp_path / "ours")
    assert len(result.certificate.sites) == 8
    for name, tensor in ours.items():  # peft rounds in float32 several times
        assert torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "bias", "targets"),
    [
        ("gpt2", "all", ["c_attn"]),
        ("gpt2", "lora_only", ["c_attn", "c_fc"]),
        ("bert", "lora_only", ["query", "output.dense"]),
        ("gpt_neox", "all", ["query_key_value"]),
    ],
)
def test_trained_biases_of_adapted_modules(family: str, bias: Any, targets: list[str], tmp_path: Path) -> None:
    """They are in the merged files, and a folder without them fails verification."""
    import peft

    base = sharded_base(tmp_path / "base", family, torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets, bias=bias, fan_in_fan_out=family == "gpt2")
    model = peft_adapter(tmp_path / "adapter", base, config)
    graftc.merge_checkpoint(tmp_path / "adapter", base, tmp_path / "ours")
    assert verify_checkpoint(tmp_path / "ours", tmp_path / "adapter", base).passed
    theirs, ours, before = model.merge_and_unload().state_dict(), tensors(tmp_path / "ours"), tensors(base)
    for name, tensor in ours.items():  # a class may name a head differently from its files
        assert torch.allclose(tensor, theirs.get(name, before[name]), rtol=1e-5, atol=1e-6), name
    trained = [name for name in ours if name.endswith(".bias") and not torch.equal(ours[name], before[name])]
    assert any(name.removesuffix(".bias").endswith(targets[0]) for name in trained)
    file = next(f for f in (tmp_path / "ours").glob("*.safetensors") if trained[0] in tensors_of(f))
    stored = load_file(file)
    save_file({**stored, trained[0]: before[trained[0]]}, file, metadata={"format": "pt"})
    assert not verify_checkpoint(tmp_path / "ours", tmp_path / "adapter", base).passed


@pytest.mark.slow
def test_float32_keeps_the_update(llama: Path, tmp_path: Path) -> None:
    result = graftc.merge_checkpoint(llama / "adapter", None, tmp_path / "wide", dtype=torch.float32)
    assert result.dtype == "float32"
    assert result.certificate.retention.entries > 0.999
    assert result.certificate.retention.error < 1e-5
    base, wide, adapter = tensors(llama / "base"), tensors(tmp_path / "wide"), tensors(llama / "adapter")
    for name, tensor in wide.items():
        module = name.removesuffix(".weight")
        folded = module.rpartition(".")[2] in PROJECTIONS
        expected = exact_lora(base[name], adapter, module, 2.0).float() if folded else base[name].float()
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor, expected, rtol=1.2e-7, atol=0), name
    model = load_model(str(tmp_path / "wide"))
    assert next(model.parameters()).dtype == torch.float32
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in wide.values())


@pytest.mark.slow
def test_files_are_as_they_were_but_for_folded_rows(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    sharded_base(base)
    (base / "tokenizer.json").write_text("{}")
    shards = sorted(base.glob("*.safetensors"))
    shards[0].chmod(0o640)
    shards[1].chmod(0o444)
    graftc.merge_checkpoint(llama / "adapter", base, tmp_path / "out")
    out = tmp_path / "out"
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (base / index).read_bytes()
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "tokenizer.json").is_file()
    for shard in shards:
        merged = out / shard.name
        assert stat.S_IMODE(merged.stat().st_mode) == stat.S_IMODE(shard.stat().st_mode)
        length = int.from_bytes(shard.read_bytes()[:8], "little") + 8
        assert merged.read_bytes()[:length] == shard.read_bytes()[:length]
        with safe_open(str(merged), "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


@pytest.mark.full
def test_measuring_writes_nothing_and_finds_the_same(llama: Path, tmp_path: Path) -> None:
    before = tree_bytes(llama)
    measured = graftc.merge_checkpoint(llama / "adapter")
    written = graftc.merge_checkpoint(llama / "adapter", None, tmp_path / "out")
    assert measured.path is None and tree_bytes(llama) == before
    assert measured.certificate.sites == written.certificate.sites
    assert measured.untouched == written.untouched


@pytest.mark.full
def test_verifying_finds_what_is_wrong(llama: Path, tmp_path: Path) -> None:
    out, base, adapter = tmp_path / "out", llama / "base", llama / "adapter"
    graftc.merge_checkpoint(adapter, None, out)
    assert verify_checkpoint(out, adapter).passed
    (out / "graftc.json").unlink()  # as in a folder written by another program
    assert verify_checkpoint(out, adapter).passed
    other = written_lora(tmp_path / "other", base, lora_alpha=9)
    failed = [check for check in verify_checkpoint(out, other).checks if check.passed is False]
    assert [check.name for check in failed] == ["folded"]
    shard = next(f for f in sorted(out.glob("*.safetensors")) if "lm_head.weight" in tensors_of(f))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    failed = [check for check in verify_checkpoint(out, adapter).checks if check.passed is False]
    assert len(failed) == 1


def tensors_of(file: Path) -> set[str]:
    """Return the names of the tensors in a file."""
    with safe_open(str(file), "pt") as opened:
        return set(opened.keys())


@pytest.mark.slow
def test_a_bias_in_another_file_of_which_some_rows_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of later blocks are folded also if the first block leaves the bias as it is."""
    monkeypatch.setattr(sites, "BLOCK", BLOCKED)
    base = sharded_base(tmp_path / "base", "bert", torch.float32)
    stored = tensors(base)
    biases = {name: stored.pop(name) for name in list(stored) if name.endswith("query.bias")}
    for file in base.glob("*.safetensors*"):
        file.unlink()
    save_file(stored, base / "weights.safetensors", metadata={"format": "pt"})
    save_file(biases, base / "biases.safetensors", metadata={"format": "pt"})
    table = {**dict.fromkeys(stored, "weights.safetensors"), **dict.fromkeys(biases, "biases.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    spec = {"adapt": [{"method": "ia3", "target": {"role": "attn.q"}, "side": "output"}]}
    compiled = graftc.compile(spec, load_model(str(base)))
    with torch.no_grad():
        for tensor in compiled.adapter_state_dict().values():
            tensor[30:] *= 1.5
    compiled.save(tmp_path / "artifact")
    result = graftc.merge_checkpoint(tmp_path / "artifact", None, tmp_path / "files")
    expected, actual = compiled.merge().folded_state_dict(), tensors(tmp_path / "files")
    assert len(biases) == 2 and all(torch.equal(actual[name], expected[name]) for name in biases)
    assert not any(torch.equal(actual[name], bias) for name, bias in biases.items())
    assert [site.retention.entries for site in result.certificate.sites] == [1.0, 1.0]


@pytest.mark.slow
def test_nothing_is_captured(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a merge of files needs no graph of a model")

    monkeypatch.setattr(torch.export, "export", refuse)
    assert graftc.merge_checkpoint(llama / "adapter").certificate.passed


@pytest.mark.slow
def test_a_file_that_lacks_a_factor(llama: Path, tmp_path: Path) -> None:
    """The code is that of importing it."""
    from tests.runtime.streaming.support import edit_adapter

    adapter = written_lora(tmp_path / "adapter", llama / "base")
    edit_adapter(adapter, lambda stored: stored.pop(min(name for name in stored if "lora_A" in name)))
    for work in (
        lambda: graftc.merge_checkpoint(adapter, None, tmp_path / "out"),
        lambda: graftc.import_peft(adapter, graftc.load_base(llama / "base")),
    ):
        with pytest.raises(GraftError) as error:
            work()
        assert error.value.code == "GC113"


@pytest.mark.full
def test_nothing_that_changes_is_an_error_unless_allowed(llama: Path, tmp_path: Path) -> None:
    from tests.runtime.streaming.support import edit_adapter

    adapter = written_lora(tmp_path / "adapter", llama / "base")
    edit_adapter(adapter, lambda stored: [t.zero_() for name, t in stored.items() if "lora_B" in name])
    with pytest.raises(GraftError, match="the update is zero") as error:
        graftc.merge_checkpoint(adapter, None, tmp_path / "out")
    assert error.value.code == "GC104"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    graftc.merge_checkpoint(adapter, None, tmp_path / "out", allow_unchanged=True)
    unchanged, base = tensors(tmp_path / "out"), tensors(llama / "base")
    assert all(torch.equal(unchanged[name], base[name]) for name in base)
    edit_adapter(adapter, lambda stored: [t.fill_(1e-9) for name, t in stored.items() if "lora_B" in name])
    with pytest.raises(GraftError, match="lost in rounding"):
        graftc.merge_checkpoint(adapter, None, tmp_path / "tiny")


@pytest.mark.slow
def test_an_update_that_is_mostly_lost_warns(tmp_path: Path) -> None:
    from tests.runtime.streaming.support import edit_adapter

    base = sharded_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = written_lora(tmp_path / "adapter", base)
    edit_adapter(adapter, lambda stored: [t.mul_(1e-4) for name, t in stored.items() if "lora_B" in name])
    with pytest.warns(GraftWarning, match=r"rounding to bfloat16 leaves .*% of the update") as warnings:
        result = graftc.merge_checkpoint(adapter, base, tmp_path / "out")
    assert [w.message.code for w in warnings if isinstance(w.message, GraftWarning)] == ["GC105"]
    assert 0 < result.certificate.retention.norm < 0.5
    with catch_warnings():
        simplefilter("error", GraftWarning)
        graftc.merge_checkpoint(adapter, base, tmp_path / "wide", dtype=torch.float32)


def test_a_folder_with_another_config_is_noted(tmp_path: Path) -> None:
    """The merged folder gets the config of the base's folder, whatever the model that was adapted had."""
    base = sharded_base(tmp_path / "base", "llama", torch.float32)
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": ROLES}]}, load_model(str(base)))
    perturb(compiled)
    compiled.save(tmp_path / "artifact")
    with catch_warnings():
        simplefilter("error", GraftWarning)
        graftc.merge_checkpoint(tmp_path / "artifact", None, tmp_path / "same")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.warns(GraftWarning, match=r"GC096: .* its config has rms_norm_eps 0\.5, not 1e-06"):
        graftc.merge_checkpoint(tmp_path / "artifact", None, tmp_path / "other")
