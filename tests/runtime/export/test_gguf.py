"""GGUF: merged models that transformers reads back, and LoRA adapters with graftc's tensors in llama.cpp's order."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing.families import tiny
from tests.kit.comparing import same_tensors
from tests.kit.models import adapted

DORA = {"method": "dora", "rank": 2, "target": {"role": ["attn.q", "attn.k", "ffn.down"]}}

gguf = pytest.importorskip("gguf")
SIZES = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}


def model_of(kind: str, **changes: Any) -> nn.Module:
    """Return a tiny random decoder of a type that transformers reads from GGUF."""
    import transformers

    torch.manual_seed(1)
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=64, **changes)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
        own = {"head_dim": 12} if kind in ("llama", "mistral") else {}
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **HEADS, **own, **changes})
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    for tensor in model.parameters():  # norms and biases as well
        tensor.data += 0.1 * torch.randn_like(tensor)
    return model.eval()


def export(model: Any, path: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftWarning)
        written: Path = model.export(path, format="gguf", **options)
    return written


def read(path: Path) -> dict[str, Tensor]:
    """Return the dequantised tensors of a file."""
    tensors = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in tensors}


@pytest.mark.full
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_merged_model_reads_back(kind: str, tmp_path: Path) -> None:
    """transformers loads the file and computes the merged model's outputs; some of GPT-2's sizes it does not read."""
    from transformers import AutoModelForCausalLM

    source = model_of(kind)
    merged = adapted(source, DORA).merge()
    sizes = {"config": source.config} if kind == "gpt2" else {}
    export(merged, tmp_path / "model.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", **sizes).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        logits, wanted = loaded(input_ids=ids).logits, merged(input_ids=ids).logits
    assert float((logits - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_sixteen_bits(dtype: str, tmp_path: Path) -> None:
    """Matrices are rounded to nearest; vectors are unchanged."""
    merged = adapted(model_of("llama"), DORA).merge()
    export(merged, tmp_path / "full.gguf")
    export(merged, tmp_path / "half.gguf", dtype=dtype)
    full, half = read(tmp_path / "full.gguf"), read(tmp_path / "half.gguf")
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    for name, tensor in full.items():
        assert torch.equal(half[name], tensor.to(kind).float() if tensor.dim() > 1 else tensor), name


@pytest.mark.slow
def test_an_adapter_by_hand(tmp_path: Path) -> None:
    """Names, sizes and scale are right; rows of q and k are in the rotation's pairs, others unchanged."""
    lora = {"method": "lora", "rank": 3, "alpha": 6, "target": {"role": ["attn.q", "attn.k", "attn.v", "ffn.down"]}}
    override = {"overrides": [{"role": "attn.v", "rank": 2, "alpha": 5}]}
    compiled = adapted(model_of("llama"), {**lora, **override})
    export(compiled, tmp_path / "adapter.gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    assert fields["adapter.lora.alpha"] == 6 and fields["general.architecture"] == "llama"
    tensors = read(tmp_path / "adapter.gguf")
    assert len(tensors) == 16
    own = compiled.adapter_state_dict()
    for layer in range(2):
        front = f"model.layers.{layer}"
        for theirs, ours, heads in (("attn_q", "self_attn.q_proj", 4), ("attn_k", "self_attn.k_proj", 2)):
            a, b = (own[f"{front}.{ours}.graftc.lora.{part}"] for part in "AB")
            assert torch.equal(tensors[f"blk.{layer}.{theirs}.weight.lora_a"], a)
            for row in range(12 * heads):
                head, at = divmod(row, 12)
                i, half = divmod(at, 2)
                assert torch.equal(tensors[f"blk.{layer}.{theirs}.weight.lora_b"][row], b[head * 12 + half * 6 + i])
        a, b = (own[f"{front}.self_attn.v_proj.graftc.lora.{part}"] for part in "AB")
        product = tensors[f"blk.{layer}.attn_v.weight.lora_b"] @ tensors[f"blk.{layer}.attn_v.weight.lora_a"]
        assert torch.allclose(6 / 2 * product, 5 / 2 * b @ a, rtol=1e-6)
        b = own[f"{front}.mlp.down_proj.graftc.lora.B"]
        assert torch.equal(tensors[f"blk.{layer}.ffn_down.weight.lora_b"], b)


@pytest.mark.full
def test_base_and_adapter_are_the_merged_model(tmp_path: Path) -> None:
    """``W + alpha / rank * lora_b @ lora_a``, as llama.cpp adds them, is the merged file's tensor."""
    lora = {"method": "lora", "rank": 3, "target": {"role": ["attn.q", "attn.v"]}}
    other = {"name": "other", "method": "lora", "rank": 2, "alpha": 5, "target": {"role": ["attn.q", "ffn.up"]}}
    for kind in ("llama", "gpt2"):
        compiled = adapted(model_of(kind), lora, other)
        place = tmp_path / kind
        place.mkdir()
        export(compiled, place / "adapter.gguf")
        export(compiled.merge(), place / "merged.gguf")
        compiled.load_adapter_state_dict({n: torch.zeros_like(t) for n, t in compiled.adapter_state_dict().items()})
        export(compiled.merge(allow_unchanged=True), place / "base.gguf")
        base, merged, adapter = (read(place / f"{word}.gguf") for word in ("base", "merged", "adapter"))
        alpha = gguf.GGUFReader(place / "adapter.gguf").fields["adapter.lora.alpha"].contents()
        changed = {name.removesuffix(".lora_a") for name in adapter if name.endswith(".lora_a")}
        for name, tensor in merged.items():
            down, up = (adapter.get(f"{name}.lora_{word}") for word in "ab")
            added = 0 if down is None or up is None else alpha / down.shape[0] * up @ down
            assert torch.allclose(base[name] + added, tensor, atol=1e-6), name
        assert changed and changed == {name for name in merged if not torch.equal(base[name], merged[name])}


@pytest.mark.full
def test_a_longer_rotation(tmp_path: Path) -> None:
    """Llama 3.1's frequencies are divided by factors that the file contains."""
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = model_of("llama", rope_parameters=rope)
    export(adapted(model, DORA).merge(), tmp_path / "model.gguf")
    factors = read(tmp_path / "model.gguf")["rope_freqs.weight"]
    usual = 500.0 ** (-torch.arange(0, 12, 2) / 12)
    assert torch.allclose(usual / factors, model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert float(factors[0]) == 1 and float(factors[-1]) == pytest.approx(8)


def tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer next to a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(number) for number in range(ord("a"), ord("z") + 1)]
    vocab = {token: number for number, token in enumerate(["<s>", "</s>", "Ġ", *letters, "th", "the"])}
    model = Tokenizer(models.BPE(vocab, merges=[("t", "h"), ("th", "e")]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


@pytest.mark.full
def test_the_tokenizer_of_the_base(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model_of("llama").save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    merged = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), DORA).merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        merged.export(tmp_path / "model.gguf", format="gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:4] == ["<s>", "</s>", "Ġ", "a"] and len(tokens) == 50 and tokens[-1] == "[PAD49]"
    assert fields["tokenizer.ggml.token_type"].contents()[:4] == [3, 3, 1, 1]
    assert fields["tokenizer.ggml.merges"].contents() == ["t h", "th e"]
    assert (fields["tokenizer.ggml.model"].contents(), fields["tokenizer.ggml.pre"].contents()) == ("gpt2", "gpt-2")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 1


@pytest.mark.slow
def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    merged = adapted(model_of("llama"), DORA).merge()
    with pytest.warns(GraftWarning, match="has no tokenizer") as caught:
        merged.export(tmp_path / "model.gguf", format="gguf")
    assert {warning.message.code for warning in caught if isinstance(warning.message, GraftWarning)} == {"GC075"}


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "adapt", "merge", "code", "words"),
    [
        ("bert", {"method": "lora", "target": {"role": "attn.q"}}, True, "GC060", "models of type 'bert'"),
        ("mixtral", {"method": "lora", "target": {"role": "attn.q"}}, True, "GC060", "models of type 'mixtral'"),
        ("llama", {"method": "dora", "target": {"role": "attn.q"}}, False, "GC066", "not plain LoRA"),
        ("llama", {"method": "lora", "init": "pissa", "target": {"role": "attn.q"}}, False, "GC066", "not plain LoRA"),
        ("gpt2", {"method": "lora", "bias": "all", "target": {"role": "attn.o"}}, False, "GC066", "in full"),
        ("gpt2", {"method": "lora", "target": {"modules": "lm_head"}}, False, "GC060", "tied to the embedding table"),
        *(
            (family, {"method": "lora", "target": target}, False, "GC060", "tied to the head")
            for family, target in (
                ("gpt2", {"modules": "transformer.wte"}),
                ("gpt2", {"role": ["attn.o", "embed"]}),
                ("llama tied", {"modules": "model.embed_tokens"}),
                ("qwen2 tied", {"role": "embed"}),
            )
        ),
    ],
)
def test_what_is_refused(
    family: str, adapt: dict[str, Any], merge: bool, code: str, words: str, tmp_path: Path
) -> None:
    kind, _, tied = family.partition(" ")
    compiled = adapted(model_of(kind, tie_word_embeddings=True) if tied else tiny(kind), {"rank": 2, **adapt})
    with pytest.raises(GraftError, match=words) as caught:
        (compiled.merge() if merge else compiled).export(tmp_path / "x.gguf", format="gguf")
    assert caught.value.code == code and caught.value.hint and not any(tmp_path.iterdir())


@pytest.mark.full
def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e5
    with pytest.raises(GraftError, match=r"output\.weight has values that f16 cannot represent"):
        export(adapted(model, DORA).merge(), tmp_path / "x.gguf", dtype="f16")
    assert not any(tmp_path.iterdir())
    with pytest.raises(GraftError, match="dtype is 'q4'") as caught:
        export(adapted(model, DORA).merge(), tmp_path / "x.gguf", dtype="q4")
    assert caught.value.code == "GC073" and caught.value.hint == "use f32, f16 or bf16"


@pytest.mark.full
def test_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command exports a merged model or only the LoRAs; a file has no inputs."""
    from transformers import LlamaForCausalLM

    from tests.cli.support import run_here

    monkeypatch.chdir(tmp_path)
    model_of("llama").save_pretrained("base")
    lora = {"method": "lora", "rank": 2, "target": {"role": "attn.q"}}
    adapted(LlamaForCausalLM.from_pretrained("base"), lora).save("artifact", certify=False)
    words = ["export", "artifact", "--format", "gguf", "--json"]
    data = run_here(capsys, *words, "--out", "merged.gguf", "--dtype", "bf16").data
    assert data["merged"] and [warning["code"] for warning in data["warnings"]] == ["GC075"]
    assert run_here(capsys, *words, "--no-merge", "--out", "lora.gguf").status == 0
    assert sorted(read(Path("lora.gguf"))) == [f"blk.{n}.attn_q.weight.lora_{w}" for n in range(2) for w in "ab"]
    error = run_here(capsys, *words, "--out", "x.gguf", "--inputs", "lora").data["error"]
    assert error["code"] == "GC090" and not Path("x.gguf").exists()
    error = run_here(capsys, *words, "--out", "x.gguf", "--dtype", "q4_0").data["error"]
    assert (error["code"], error["hint"]) == ("GC073", "use f32, f16 or bf16") and not Path("x.gguf").exists()


@pytest.mark.slow
def test_an_adapter_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's folder gives the same file as the adapter that it was exported from; a wrong order is caught."""
    from graftc.runtime.export.gguf import adapter as writer
    from graftc.runtime.export.gguf.convert import convert_to_gguf
    from graftc.runtime.interop.layouts.convert import AdapterSource

    model = model_of("llama")
    model.config.save_pretrained(tmp_path / "base")
    lora = {"method": "lora", "rank": 2, "alpha": 5, "target": {"role": ["attn.q", "attn.k", "ffn.up"]}}
    compiled = adapted(model, lora)
    compiled.export(tmp_path / "peft", format="peft")
    export(compiled, tmp_path / "own.gguf")
    source = AdapterSource.of(tmp_path / "peft", model=tmp_path / "base")
    conversion = convert_to_gguf(source, tmp_path / "made.gguf", tmp_path / "base")
    assert conversion.largest_error < 1e-12 and conversion.rank == 2 and len(conversion.sites) == 6
    own, other = read(tmp_path / "own.gguf"), read(tmp_path / "made.gguf")
    assert same_tensors(own, other)
    with pytest.raises(GraftError, match="needs the config of the base"):
        convert_to_gguf(source, None, None)
    monkeypatch.setattr(writer, "stored", lambda family, heads, name, tensor: tensor)
    with pytest.raises(GraftError, match=r"update differs at 4 of 6 maps: .*(q|k)_proj") as caught:
        convert_to_gguf(source, tmp_path / "wrong.gguf", tmp_path / "base")
    assert caught.value.code == "GC067" and not (tmp_path / "wrong.gguf").exists()


@pytest.mark.slow
def test_files_for_engines(tmp_path: Path) -> None:
    """OpenVINO GenAI reads whole models with matrices in f16 only, and no adapters; llama.cpp reads any type."""
    compiled: Any = adapted(model_of("llama"), {"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}})
    merged = compiled.merge()
    with pytest.raises(GraftError, match="the matrices are F32, but OpenVINO GenAI needs f16") as caught:
        merged.export(tmp_path / "model.gguf", "gguf", server="openvino", dtype="f32")
    assert caught.value.code == "GC068"
    with pytest.raises(GraftError, match="openvino does not load a GGUF adapter") as caught:
        compiled.export(tmp_path / "adapter.gguf", "gguf", server="openvino")
    assert caught.value.code == "GC068" and not any(tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftWarning)  # the base has no tokenizer
        merged.export(tmp_path / "model.gguf", "gguf", server="openvino")
        merged.export(tmp_path / "other.gguf", "gguf", server="llama.cpp")
    compiled.export(tmp_path / "adapter.gguf", "gguf", server="llama.cpp")
    for name, kind in (("model", "F16"), ("other", "F32")):
        tensors = gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors
        assert {tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1} == {kind}
