"""Layouts of adapter folders: every conversion gives the same update, and a probe catches wrong ones."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from graftc.runtime.interop.layouts import convert as module
from graftc.runtime.interop.layouts import folder as folders
from graftc.runtime.interop.layouts.convert import AdapterSource, ConvertedFolder, convert_folder
from graftc.runtime.interop.layouts.plain import AttentionSizes
from graftc.runtime.interop.layouts.rotary import as_halves, as_pairs
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.releases import needs
from tests.runtime.interop.adapters import base, config_of, outputs, written


def converted(folder: Path, out: Path | None, to: str = "peft", **options: Any) -> ConvertedFolder:
    read = {"layout": options.pop("source", None), "add": options.pop("add", ()), "model": options.pop("model", None)}
    return convert_folder(AdapterSource.of(folder, **read), out, to, **options)


MOE = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ALL = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("peft", "0.19", "earlier ones write the factors of experts in swapped order")
    folder, model = tmp_path_factory.mktemp("moe"), base("mixtral")
    return with_base(written(model, folder / "peft", **MOE), config_of(model, folder / "base"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(base("llama"), tmp_path_factory.mktemp("dense") / "peft", **ALL)


@pytest.fixture(scope="module")
def llama_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_of(base("llama"), tmp_path_factory.mktemp("llama"))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return fields


def with_base(adapter: Path, named: Path | None) -> Path:
    """Set the base that the folder's config names and return the folder."""
    about = {**config(adapter), "base_model_name_or_path": None if named is None else str(named)}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    return adapter


@pytest.mark.parametrize("layout", ["vllm", "sglang", "unsloth", "tinker"])
def test_experts_there_and_back(moe: Path, tmp_path: Path, layout: str) -> None:
    """After a round trip PEFT gives the same outputs and finds every key."""
    conversion = converted(moe, tmp_path / "there", layout)
    assert conversion.largest_error < 1e-12 and len(conversion.sites) > 20
    source = layout if layout == "unsloth" else None
    back = converted(tmp_path / "there", tmp_path / "back", "peft", source=source)
    assert back.largest_error < 1e-12 and back.source == ("sglang" if layout == "tinker" else layout)
    model = base("mixtral")
    assert tensors(tmp_path / "back").keys() == tensors(moe).keys()
    returned, wanted = outputs(model, tmp_path / "back"), outputs(model, moe)
    assert float((returned - wanted).abs().max()) < 1e-6 < float((wanted - outputs(model, None)).abs().max())


def test_one_expert_by_hand(moe: Path, tmp_path: Path) -> None:
    """vLLM's and SGLang's keys give the same update of one expert's up projection as PEFT's own."""
    converted(moe, tmp_path / "vllm", "vllm")
    converted(moe, tmp_path / "sglang", "sglang")
    front = "base_model.model.model.layers.1.mlp.experts"
    original, each, stacked = tensors(moe), tensors(tmp_path / "vllm"), tensors(tmp_path / "sglang")
    down, up = original[f"{front}.base_layer.lora_A.weight"], original[f"{front}.base_layer.lora_B.weight"]
    experts, half = down.shape[0] // 3, up.shape[0] // 2
    for expert in range(experts):
        own = up.reshape(up.shape[0], 3, experts)[..., expert] @ down.reshape(experts, 3, -1)[expert]
        a, b = (each[f"{front}.{expert}.up_proj.lora_{word}.weight"] for word in "AB")
        assert torch.allclose(b @ a, own[half:], atol=1e-6)
        a, b = (each[f"{front}.{expert}.gate_proj.lora_{word}.weight"] for word in "AB")
        assert torch.allclose(b @ a, own[:half], atol=1e-6)
        a, b = (stacked[f"{front}.w3.lora_{word}.weight"][expert] for word in "AB")
        assert torch.allclose(b @ a, own[half:], atol=1e-6)


@pytest.mark.slow
def test_one_rank_for_servers(moe: Path, dense: Path, tmp_path: Path) -> None:
    """Servers' layouts put the ranks and scales that a config states by pattern into the tensors."""
    patterns = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 28, "v_proj": 2}}
    uneven = written(base("llama"), tmp_path / "uneven", **ALL, **patterns)
    conversion = converted(uneven, tmp_path / "vllm", "vllm")
    fields = config(tmp_path / "vllm")
    assert fields["r"] == 5 == conversion.rank and not fields.get("rank_pattern") and conversion.largest_error < 1e-6
    assert {t.shape[0] for n, t in tensors(tmp_path / "vllm").items() if "lora_A" in n} == {5}
    model = base("llama")
    assert float((outputs(model, tmp_path / "vllm") - outputs(model, uneven)).abs().max()) < 1e-5
    back = converted(uneven, tmp_path / "peft", "peft")
    assert back.largest_error == 0 and config(tmp_path / "peft")["rank_pattern"]
    assert float((outputs(model, tmp_path / "peft") - outputs(model, uneven)).abs().max()) < 1e-6


def test_fused_and_apart(tmp_path: Path) -> None:
    """q, k and v of one map are split and joined again, with the same outputs of PEFT on the fused model."""
    model = base("phi3")
    model.config.save_pretrained(tmp_path / "phi3")
    fused = written(model, tmp_path / "fused", target_modules=["qkv_proj", "gate_up_proj", "o_proj"])
    options: dict[str, Any] = {"model": tmp_path / "phi3"}
    apart = converted(fused, tmp_path / "apart", apart=["qkv", "gate_up"], **options)
    shapes = {n.split(".")[-3]: t.shape for n, t in tensors(tmp_path / "apart").items() if ".0." in n and "lora_B" in n}
    assert {n: s[0] for n, s in shapes.items()} == {
        **{"q_proj": 24, "k_proj": 12, "v_proj": 12, "o_proj": 24, "gate_proj": 20, "up_proj": 20}
    }
    again = converted(tmp_path / "apart", tmp_path / "again", join=["qkv", "gate_up"])
    assert apart.largest_error < 1e-12 and again.largest_error < 1e-12
    assert {n: t.shape for n, t in tensors(tmp_path / "again").items()} == {
        n: t.shape for n, t in tensors(fused).items()
    }
    assert float((outputs(model, tmp_path / "again") - outputs(model, fused)).abs().max()) < 1e-6


def test_ranks_add_where_parts_are_joined(dense: Path, tmp_path: Path) -> None:
    """Parts with an A of their own become block-diagonal, and splitting restores the ranks; a missing part is zero."""
    converted(dense, tmp_path / "fused", join=["qkv"])
    shapes = {t.shape[0] for n, t in tensors(tmp_path / "fused").items() if "qkv_proj.lora_A" in n}
    assert shapes == {9}
    few = written(base("llama"), tmp_path / "few", target_modules=["q_proj", "v_proj"])
    conversion = converted(few, tmp_path / "few_fused", join=["qkv"])
    assert conversion.largest_error < 1e-12 and conversion.rank == 6
    with pytest.raises(GraftError, match="rows of q_proj, k_proj, v_proj are not known") as caught:
        converted(tmp_path / "fused", None, apart=["qkv"])
    assert caught.value.code == "GC069"


def test_torchtune_by_hand(dense: Path, llama_config: Path, tmp_path: Path) -> None:
    """Names are mapped, and a rotated head's rows are permuted: torchtune's neighbours are transformers' halves."""
    conversion = converted(dense, tmp_path / "tune", "torchtune", model=llama_config)
    original, tune = tensors(dense), tensors(tmp_path / "tune")
    front = "base_model.model.model.layers.1"
    heads = AttentionSizes.of(json.loads((llama_config / "config.json").read_text()), "llama")
    for theirs, ours in (
        ("attn.output_proj", "self_attn.o_proj"),
        ("mlp.w3", "mlp.up_proj"),
        ("mlp.w1", "mlp.gate_proj"),
    ):
        assert torch.equal(tune[f"layers.1.{theirs}.lora_b.weight"], original[f"{front}.{ours}.lora_B.weight"])
    own, other = original[f"{front}.self_attn.k_proj.lora_B.weight"], tune["layers.1.attn.k_proj.lora_b.weight"]
    size = heads.size
    for head in range(heads.keys):
        for i in range(size // 2):
            assert torch.equal(other[head * size + 2 * i], own[head * size + i])
            assert torch.equal(other[head * size + 2 * i + 1], own[head * size + size // 2 + i])
    back = converted(tmp_path / "tune", tmp_path / "back", model=llama_config)
    assert conversion.largest_error < 1e-12 and back.source == "torchtune" and back.largest_error < 1e-12
    assert all(torch.equal(t, original[n]) for n, t in tensors(tmp_path / "back").items())
    with pytest.raises(GraftError, match="depends on the heads") as caught:
        converted(dense, None, "torchtune")
    assert caught.value.code == "GC069"


def test_rotated_rows_go_there_and_back() -> None:
    rows = torch.randn(24, 5)
    assert torch.equal(as_halves(as_pairs(rows, 3), 3), rows) and not torch.equal(as_pairs(rows, 3), rows)


def test_the_head_of_tinker(tmp_path: Path) -> None:
    model = base("llama")
    own = written(model, tmp_path / "own", target_modules=["q_proj", "lm_head"])
    converted(own, tmp_path / "tinker", "tinker")
    assert "base_model.model.model.unembed_tokens.lora_A.weight" in tensors(tmp_path / "tinker")
    conversion = converted(tmp_path / "tinker", tmp_path / "back")
    plain = {name for name in tensors(own) if ".lora_" in name}  # PEFT saves the head's own weight as well
    assert conversion.source == "tinker" and tensors(tmp_path / "back").keys() == plain


def test_a_shared_factor_of_experts(moe: Path, tmp_path: Path) -> None:
    """Tinker and SGLang may store one A for all experts."""
    converted(moe, tmp_path / "own", "sglang")
    stored = tensors(tmp_path / "own")
    for name, tensor in stored.items():
        if ".w1.lora_A" in name or ".w3.lora_A" in name:
            stored[name] = tensor[:1].clone()
    save_file(stored, tmp_path / "own" / "adapter_model.safetensors")
    conversion = converted(tmp_path / "own", tmp_path / "vllm", "vllm")
    front = "base_model.model.model.layers.0.mlp.experts"
    each = tensors(tmp_path / "vllm")
    assert conversion.largest_error < 1e-12
    assert torch.equal(each[f"{front}.3.gate_proj.lora_A.weight"], stored[f"{front}.w1.lora_A.weight"][0])


def test_several_become_one(dense: Path, tmp_path: Path) -> None:
    """The updates are added, even if only one adapter has a map and if scales differ."""
    other = written(base("llama"), tmp_path / "other", seed=1, target_modules=["q_proj"], r=2, lora_alpha=3)
    conversion = converted(dense, tmp_path / "both", add=[other])
    assert conversion.rank == 5 and conversion.largest_error < 1e-6
    loaded = [tensors(path) for path in (dense, other, tmp_path / "both")]
    front = "base_model.model.model.layers.0.self_attn.q_proj"
    one, two, both = (t[f"{front}.lora_B.weight"] @ t[f"{front}.lora_A.weight"] for t in loaded)
    scale = config(tmp_path / "both")["alpha_pattern"].get("model.layers.0.self_attn.q_proj", 0) / 5
    assert torch.allclose(scale * both, 7 / 3 * one + 3 / 2 * two, atol=1e-5)


def test_adapters_of_two_bases(dense: Path, llama_config: Path, tmp_path: Path) -> None:
    """A different base is recognised by its name or by its modules and sizes."""
    llama = with_base(shutil.copytree(dense, tmp_path / "llama"), llama_config)
    other = written(base("gpt2"), tmp_path / "other", target_modules=["c_attn"], fan_in_fan_out=True)
    with_base(other, tmp_path / "elsewhere")
    with pytest.raises(GraftError, match="name different bases"):
        converted(llama, tmp_path / "out", add=[other])
    for options in ({"model": llama_config}, {}):
        with pytest.raises(GraftError, match=r"a base other than .*: it has no transformer\.h\.0\.attn\.c_attn"):
            converted(llama, tmp_path / "out", add=[with_base(other, None)], **options)
    wide = tiny("llama", hidden_size=96, num_attention_heads=4)
    with pytest.raises(GraftError, match="but the adapter is for"):
        converted(llama, tmp_path / "out", model=config_of(wide, tmp_path / "wide"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("{", "GC111"),
        ("null", "GC111"),
        ('{"peft_type": "LORA", "r": NaN}', "GC111"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "GC111"),
        ('{"peft_type": "LORA", "r": 3, "r": 4}', "GC111"),
        ("[" * 5000, "GC111"),
        ({"lora_alpha": None}, "GC111"),
        ({"rank_pattern": {f"(a|b){n}.*": 4 for n in range(5000)}}, "GC008"),
    ],
    ids=["cut off", "null", "nan", "infinite", "twice", "deep", "no scale", "many"],
)
def test_hostile_configs(dense: Path, tmp_path: Path, change: Any, code: str) -> None:
    folder = shutil.copytree(dense, tmp_path / "own")
    text = change if isinstance(change, str) else json.dumps({**config(folder), **change})
    (folder / "adapter_config.json").write_text(text)
    started = time.process_time()
    with pytest.raises(GraftError) as caught:
        converted(folder, tmp_path / "out", "vllm")
    assert caught.value.code == code and time.process_time() - started < 20
    assert not (tmp_path / "out").exists()


def test_a_pattern_that_python_would_never_finish(dense: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "own")
    patterns = {"rank_pattern": {"(([a-z_.0-9])+)+!": 4}, "alpha_pattern": {"(([a-z_.0-9])+)+!": 4}}
    (folder / "adapter_config.json").write_text(json.dumps({**config(folder), **patterns}))
    started = time.process_time()
    assert converted(folder, None, "vllm").largest_error < 1e-6 and time.process_time() - started < 20


def test_a_factor_that_is_missing(moe: Path, tmp_path: Path) -> None:
    converted(moe, tmp_path / "own", "vllm")
    lost = "layers.0.mlp.experts.1.up_proj.lora_A.weight"
    kept = {n: t for n, t in tensors(tmp_path / "own").items() if not n.endswith(lost)}
    save_file(kept, tmp_path / "own" / "adapter_model.safetensors")
    with pytest.raises(GraftError, match=r"experts\.1\.up_proj has no lora_A") as caught:
        converted(tmp_path / "own", None, "peft")
    assert caught.value.code == "GC113"


def rolled(tensor: Tensor) -> Tensor:
    return tensor.roll(1, 0)


@pytest.mark.parametrize(
    "fault", ["order of experts", "gate and up", "B by expert", "sign", "rotation", "one map lost"]
)
def test_a_wrong_writer_is_caught(
    fault: str, moe: Path, dense: Path, llama_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe reads the output by its own description of the layout, and a mismatch leaves no folder behind."""
    right = folders._keyed
    source, to, options = moe, "vllm", {}

    def keyed(path: str, update: Any, layout: Any, updates: Any) -> Any:
        pairs = list(right(path, update, layout, updates))
        if fault == "order of experts" and ".experts" in path:
            names = [name for name, _ in pairs]
            return zip([*names[2:], *names[:2]], (value for _, value in pairs), strict=True)
        if fault == "gate and up":
            swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
            return [(".".join(swap.get(s, s) for s in name.split(".")), value) for name, value in pairs]
        if fault == "sign" and path.endswith("v_proj"):
            return [(name, -value if "lora_B" in name else value) for name, value in pairs]
        if fault == "one map lost" and path.endswith("v_proj"):
            return []
        return pairs

    if fault == "B by expert":
        to = "peft"
        monkeypatch.setattr(
            folders,
            "to_theirs",
            lambda form, t, s: t.transpose(-2, -3).flatten(-2) if form == "up" else t.flatten(0, 1),
        )
    elif fault == "rotation":
        source, to, options = dense, "torchtune", {"model": llama_config}
        monkeypatch.setattr(folders, "as_pairs", as_halves)
    else:
        monkeypatch.setattr(folders, "_keyed", keyed)
    with pytest.raises(GraftError, match="update differs at") as caught:
        converted(source, tmp_path / "out", to, **options)
    assert caught.value.code == "GC067" and caught.value.details and not (tmp_path / "out").exists()


def test_a_wrong_layout_of_the_source_is_no_secret(moe: Path, tmp_path: Path) -> None:
    """Unsloth's order has the same keys as PEFT's: read as the other one, it gives a different adapter."""
    converted(moe, tmp_path / "right", "vllm")
    converted(moe, tmp_path / "wrong", "vllm", source="unsloth")
    one, other = tensors(tmp_path / "right"), tensors(tmp_path / "wrong")
    assert one.keys() == other.keys() and any(not torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(
    ("change", "to", "code", "words"),
    [
        ({"use_dora": True}, "vllm", "GC069", "adapted by dora"),
        ({"modules_to_save": ["lm_head"]}, "vllm", "GC069", "trained in full"),
        ({"bias": "all"}, "vllm", "GC069", "trained in full|saved in full"),
        ({}, "vlm", "GC069", "did you mean 'vllm'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], to: str, code: str, words: str, tmp_path: Path) -> None:
    own = written(
        base("gpt2" if "bias" in change else "llama"),
        tmp_path / "own",
        **{"target_modules": ["c_attn"] if "bias" in change else ["q_proj"], **change},
    )
    with pytest.raises(GraftError) as caught:
        converted(own, tmp_path / "out", to)
    import re

    assert caught.value.code == code and re.search(words, f"{caught.value} {caught.value.hint}")
    assert not (tmp_path / "out").exists()


def test_experts_that_are_missing(moe: Path, tmp_path: Path) -> None:
    converted(moe, tmp_path / "own", "vllm")
    kept = {n: t for n, t in tensors(tmp_path / "own").items() if ".experts.1.up_proj" not in n}
    save_file(kept, tmp_path / "own" / "adapter_model.safetensors")
    with pytest.raises(GraftError, match=r"experts 1 of .* are missing"):
        converted(tmp_path / "own", None, "peft")
    with pytest.raises(GraftError, match=r"has no adapter_config\.json"):
        converted(tmp_path, None, "peft")
    assert module.is_adapter_folder(moe)


def transposed() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"hidden_size": 24, "intermediate_size": 20, "intermediate_size_mlp": 20, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "pad_token_id": 0}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, num_local_experts=3, interleave_moe_layer_step=1))


def interleaved() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 50, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=3, num_experts_per_tok=2))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (None, "the base is needed"),
        (transposed, r"Llama4ForCausalLM.*stored as \[in, out\]|no such module"),
        (interleaved, r"GptOssForCausalLM.*stored as \[in, out\]"),
        (lambda: base("llama"), "LlamaForCausalLM.*no such module"),
    ],
    ids=["no base", "transposed", "interleaved", "another base"],
)
@pytest.mark.parametrize("way", ["there", "back"])
def test_experts_that_are_stored_otherwise(moe: Path, tmp_path: Path, build: Any, words: str, way: str) -> None:
    """The order of experts is determined by the base, not by the keys."""
    source = tmp_path / "source"
    if way == "there":
        shutil.copytree(moe, source)
    else:
        converted(moe, source, "vllm")
    with_base(source, None if build is None else config_of(build(), tmp_path / "other"))
    with pytest.raises(GraftError, match=words) as caught:
        converted(source, tmp_path / "out", "vllm" if way == "there" else "peft")
    assert caught.value.code == "GC069" and not (tmp_path / "out").exists()


def test_rows_that_alternate(moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alternating rows cannot be recognised by sizes; transformers' class declares them."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    monkeypatch.setattr(
        MixtralExperts, "is_concatenated", property(lambda self: False, lambda self, value: None), raising=False
    )
    with pytest.raises(GraftError, match="alternate"):
        converted(moe, None, "vllm")


def test_gate_and_up_with_factors_of_their_own(moe: Path, tmp_path: Path) -> None:
    """Ranks add if PEFT has one map for both.

    PEFT, which finds the ranks by pattern, gives the outputs of weights with each expert's update added.
    """
    converted(moe, tmp_path / "own", "vllm")
    stored = tensors(tmp_path / "own")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in stored.items():
        if ".up_proj.lora_A" in name:
            stored[name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(stored, tmp_path / "own" / "adapter_model.safetensors")
    conversion = converted(tmp_path / "own", tmp_path / "peft")
    assert conversion.rank == 6 and conversion.largest_error < 1e-12
    model = base("mixtral")
    converted_outputs = outputs(model, tmp_path / "peft")
    with torch.no_grad():
        for name in (n for n in stored if "lora_A" in n):
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            update = 7 / 3 * stored[name.replace("lora_A", "lora_B")] @ stored[name]
            if ".experts." not in path:
                model.get_parameter(f"{path}.weight").add_(update)
                continue
            owner, expert, last = path.rsplit(".", 2)
            weight = model.get_parameter(f"{owner}.{'down_proj' if last == 'down_proj' else 'gate_up_proj'}")[
                int(expert)
            ]
            half = weight.shape[0] // 2
            rows = {"gate_proj": slice(0, half), "up_proj": slice(half, None), "down_proj": slice(None)}[last]
            weight[rows].add_(update)
    assert float((converted_outputs - outputs(model, None)).abs().max()) < 1e-5
