"""Folders of quantised models: exact values, refused folders, and adapters that name their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import graftc
from graftc.passes.core.packing.modules import packed_weights
from graftc.passes.core.packing.packed_tensor import dense as dense_value
from graftc.specs.errors.diagnostics import GraftError
from tests.runtime.sources.quantised.saving import require_refused, saved_and_loaded
from tests.runtime.sources.quantised.writers import FORMATS, gptq, llama, write

LORA = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.up"]}}]}
IDS = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
quiet = pytest.mark.filterwarnings("ignore:GC164")


def written(folder: Path, name: str) -> dict[str, Tensor]:
    dtype, writer, options = FORMATS[name]
    return write(folder, llama(dtype), writer, options)


@quiet
@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_those_of_the_format_to_the_bit(name: str, tmp_path: Path) -> None:
    dense = written(tmp_path, name)
    model: Any = graftc.load_base(tmp_path)
    packed = packed_weights(model)
    assert packed.keys() == dense.keys()
    assert [key for key, weight in dense.items() if not torch.equal(dense_value(packed[key]), weight)] == []
    assert all(tensor.dtype == model.dtype == FORMATS[name][0] for tensor in packed.values())
    assert not any(p.is_meta or (p.dtype == torch.uint8 and p.requires_grad) for p in model.parameters())


@pytest.mark.full
@quiet
@pytest.mark.parametrize("name", ["gptq 4 by activations", "hqq 4 across", "fp8 blocks"])
def test_a_compiled_model_computes_with_them(name: str, tmp_path: Path) -> None:
    dense = written(tmp_path, name)
    plain = llama(FORMATS[name][0])
    plain.load_state_dict({**plain.state_dict(), **dense})
    compiled: Any = graftc.compile(LORA, graftc.load_base(tmp_path, dtype=torch.float32)).eval()
    with torch.no_grad():
        expected, logits = plain.float()(IDS).logits, compiled(input_ids=IDS).logits
    # In float32, a weight may have more digits than in the checkpoint's own dtype only if the format says so.
    assert torch.allclose(logits, expected, atol=1e-5 if "fp8" not in name else 2e-2)


@pytest.mark.full
@quiet
@pytest.mark.parametrize("name", ["awq", "fp8 one scale"])
def test_adapters_name_the_folder_and_load_on_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    written(folder, name)
    compiled = graftc.compile(LORA, graftc.load_base(folder))
    require_refused(saved_and_loaded(tmp_path, compiled, IDS), llama(FORMATS[name][0]))


def test_experts_of_mxfp4_are_those_of_transformers(tmp_path: Path) -> None:
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=99,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(0)
    model: Any = GptOssForCausalLM(config).bfloat16().eval()
    state, dense = dict(model.state_dict()), {}
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = state.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, width // 32, 16), dtype=torch.uint8)
        scales = torch.randint(115, 124, blocks.shape[:3], dtype=torch.uint8)
        dense[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
        state |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    _save(tmp_path, model, state, {"quant_method": "mxfp4"})
    loaded: Any = graftc.load_base(tmp_path)
    packed = packed_weights(loaded)
    assert packed.keys() == dense.keys()
    assert all(torch.equal(dense_value(packed[name]), weight) for name, weight in dense.items())
    model.load_state_dict({**model.state_dict(), **dense})
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=0.02)  # bfloat16, another layout


@quiet
def test_experts_that_are_stored_one_by_one_are_joined(tmp_path: Path) -> None:
    """Mixtral's files contain the matrices of each expert, and its module has all experts in one tensor."""
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(config).bfloat16().eval()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if ".experts." in name]:
        codes = (state[name].float() * 2000).clamp(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.rand(2, 2) * 1e-3 + 1e-4
        state[name] = (codes.float() * scales.repeat_interleave(32, 0).repeat_interleave(32, 1)).bfloat16()
        state |= {f"quantised {name}": codes, f"quantised {name}_scale_inv": scales}
    dense = {name: tensor for name, tensor in state.items() if not name.startswith("quantised")}
    _save(tmp_path / "dense", model, dense, None)
    stored = dense | {n.removeprefix("quantised "): t for n, t in state.items() if n.startswith("quantised")}
    _save(tmp_path, model, stored, {"quant_method": "fp8", "weight_block_size": [32, 32]})
    packed, expected = packed_weights(graftc.load_base(tmp_path)), graftc.load_base(tmp_path / "dense").state_dict()
    assert sorted(packed) == [f"model.layers.0.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    assert all(torch.equal(dense_value(weight), expected[name]) for name, weight in packed.items())


def test_experts_whose_groups_are_of_any_inputs_are_not_joined(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model: Any = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=99, num_local_experts=2))
    model.half().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if ".experts." in name]:
        stored, _ = gptq(4, order=True)(state.pop(name))
        state |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in stored.items()}
    _save(tmp_path, model, state, FORMATS["gptq 4"][2])
    with pytest.raises(GraftError, match=r"GC161.*cannot be joined"):
        graftc.load_base(tmp_path)


def _save(folder: Path, model: Any, state: dict[str, Tensor], options: dict[str, Any] | None) -> None:
    folder.mkdir(exist_ok=True)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [type(model).__name__]}
    config |= {"dtype": "bfloat16"} | ({} if options is None else {"quantization_config": options})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})


REFUSED = {
    "aqlm": {"quant_method": "aqlm"},
    "eetq": {"quant_method": "eetq"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "no method": {},
    "a kernel's layout": {**FORMATS["gptq 4"][2], "checkpoint_format": "marlin"},
    "five bits": {**FORMATS["gptq 4"][2], "bits": 5},
    "no bits": {"quant_method": "gptq"},
    "gemv": {**FORMATS["awq"][2], "version": "gemv"},
    "nvfp4": {**FORMATS["compressed 4"][2], "format": "nvfp4-pack-quantized"},
    "sparse": {**FORMATS["compressed 4"][2], "sparsity_config": {"format": "sparse-24-bitmask"}},
    "no groups": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused(name: str, tmp_path: Path) -> None:
    """Other formats are refused before transformers looks for packages that are not installed."""
    _, writer, _ = FORMATS["gptq 4"]
    write(tmp_path, llama(), writer, REFUSED[name])
    with pytest.raises(GraftError, match="GC161") as caught:
        graftc.load_base(tmp_path)
    assert caught.value.hint


def _dropped(part: str) -> Any:
    return lambda state, name: state.pop(f"{name}.{part}")


def _instead(part: str, make: Any) -> Any:
    return lambda state, name: state.update({f"{name}.{part}": make(state[f"{name}.{part}"]).contiguous()})


DAMAGED = {
    "no scales": ("gptq 4", _dropped("scales")),
    "no zero points": ("awq", _dropped("qzeros")),
    "fewer scales": ("gptq 4", _instead("scales", lambda t: t[:1])),
    "fewer words": ("gptq 4", _instead("qweight", lambda t: t[:-1])),
    "other words": ("awq", _instead("qweight", lambda t: t.float())),
    "groups beyond": ("gptq 4 by activations", _instead("g_idx", lambda t: t + 1)),
    "negative groups": ("gptq 4 by activations", _instead("g_idx", lambda t: t - 1)),
    "fewer blocks": ("fp8 blocks", _instead("weight_scale_inv", lambda t: t[:, :-1].repeat(1, 5))),
    "blocks of another size": ("fp8 blocks", _instead("weight_scale_inv", lambda t: t[:1])),
    "one scale for blocks": ("fp8 blocks", _instead("weight_scale_inv", lambda t: t[0, 0])),
    "no blocks": ("fp8 blocks", _dropped("weight_scale_inv")),
    "another shape": ("compressed 4", _instead("weight_shape", lambda t: t.flip(0) + 1)),
    "fewer codes": ("hqq 4", _instead("W_q", lambda t: t[:-1])),
    "codes that are turned": ("hqq 4", _instead("W_q", lambda t: t.T)),
    "codes of the other axis": ("hqq 4", _instead("axis", lambda t: 1 - t)),
    "scales that are turned": ("hqq 4", _instead("scale", lambda t: t.T)),
    "zero points of another form": ("hqq 4", _instead("zero", lambda t: t.reshape(-1))),
    "a weight of whole numbers beside its scale": ("fp8 blocks", _instead("weight", lambda t: t.view(torch.uint8))),
    "a weight of signed numbers beside its scale": ("fp8 blocks", _instead("weight", lambda t: t.view(torch.int8))),
    "a weight that is not quantised beside its scale": ("fp8 blocks", _instead("weight", lambda t: t.bfloat16())),
    "the same in float32, with one scale": ("fp8 one scale", _instead("weight", lambda t: t.float())),
    "words beside a scale": ("compressed int8", _instead("weight", lambda t: t.int())),
    "numbers beside a scale": ("compressed int8", _instead("weight", lambda t: t.half())),
    "a weight instead of words": (
        "gptq 4",
        lambda state, name: state.update({f"{name}.weight": torch.zeros(96, 64), f"{name}.qweight": None}),
    ),
    "a group of nothing": ("hqq 4", _instead("group_size", lambda t: t * 0 - 3)),
    "another axis": ("hqq 4", _instead("axis", lambda t: t + 5)),
}


@quiet
@pytest.mark.parametrize(("name", "part"), [("compressed fp8", "weight_scale"), ("fp8 one scale", "weight_scale_inv")])
@pytest.mark.parametrize("of", ["rows", "columns"])
def test_scales_of_rows_and_of_columns_of_a_square_weight(name: str, part: str, of: str, tmp_path: Path) -> None:
    written(tmp_path, name)
    state, module = load_file(tmp_path / "model.safetensors"), "model.layers.1.self_attn.q_proj"
    codes = state[f"{module}.weight"]
    scales = torch.rand((64, 1) if of == "rows" else (1, 64), generator=torch.Generator().manual_seed(0)) + 0.5
    scales = scales.to(state[f"{module}.{part}"].dtype)
    state[f"{module}.{part}"] = scales
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    weight = dense_value(packed_weights(graftc.load_base(tmp_path))[f"{module}.weight"])
    assert codes.shape == (64, 64) and torch.equal(weight, (codes.to(scales.dtype) * scales).to(weight.dtype))


@quiet
@pytest.mark.parametrize("name", DAMAGED)
def test_what_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    kind, damage = DAMAGED[name]
    written(tmp_path, kind)
    state = load_file(tmp_path / "model.safetensors")
    damage(state, "model.layers.1.mlp.up_proj")
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraftError, match="GC163"):
        graftc.load_base(tmp_path)


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "a method": ("gptq 4", {"quant_method": list(range(9_000))}),
    "bits": ("gptq 4", {"bits": 10**400}),
    "a group": ("gptq 4", {"group_size": ["x" * 20_000]}),
    "a layout": ("gptq 4", {"checkpoint_format": "x" * 50_000}),
    "a packing": ("awq", {"version": "x" * 50_000}),
    "a block": ("fp8 blocks", {"weight_block_size": list(range(9_000))}),
    "numbers": ("fp8 blocks", {"fmt": {"x" * 50_000: 1}}),
    "a format": ("compressed 4", {"format": "x" * 50_000}),
    "sparse": ("compressed 4", {"sparsity_config": {"format": "x" * 50_000}}),
    "widths": ("compressed 4", {"config_groups": {"a": {"weights": {"num_bits": "x" * 50_000}}}}),
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_option_is_shown_in_part(name: str, tmp_path: Path) -> None:
    kind, options = LONG[name]
    written(tmp_path, kind)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= options
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraftError, match="GC161") as caught:
        graftc.load_base(tmp_path)
    assert len(str(caught.value)) < 1_000


def test_a_weight_without_a_place_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "gptq 4")
    state = load_file(tmp_path / "model.safetensors")
    state = {name.replace("layers.1.", "layers.7."): tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(GraftError, match=r"GC163.*no place for model\.layers\.7"):
        graftc.load_base(tmp_path)


def test_an_index_names_files_of_the_folder_only(tmp_path: Path) -> None:
    written(tmp_path, "gptq 4")
    (tmp_path / "model.safetensors").rename(tmp_path / "part.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(tmp_path / "part.safetensors"), "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert packed_weights(graftc.load_base(tmp_path))
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../part.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GraftError, match=r"GC101.*not in the folder"):
        graftc.load_base(tmp_path)


@pytest.mark.filterwarnings("always:GC164")
def test_rounded_activations_are_said(tmp_path: Path) -> None:
    written(tmp_path, "fp8 one scale")
    with pytest.warns(graftc.GraftWarning, match="GC164"):
        graftc.load_base(tmp_path)
