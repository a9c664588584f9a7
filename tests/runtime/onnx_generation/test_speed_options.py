"""The options of `onnx-generate` that make decoding fast: logits of the last token only, and fused operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import graftc
from graftc.runtime.onnx_generation import load
from graftc.testing import perturb
from tests.runtime.onnx_generation.onnx_folders import adapted_source
from tests.runtime.onnx_generation.onnx_toy import fails

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 17, 40, 9, 23, 17, 40], [11, 30, 9, 8, 7, 33, 21]])
MASK = torch.tensor([[1] * 7, [0, 0, 0, 1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def merged() -> Any:
    return adapted_source("llama").merge()


@pytest.fixture(scope="module")
def folders(merged: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("graphs")
    return {
        "last": merged.export(top / "last", "onnx-generate"),
        "all": merged.export(top / "all", "onnx-generate", logits="all", opset=20),
    }


def operators(folder: Path) -> set[str]:
    return {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


@pytest.mark.full
def test_operators(folders: dict[str, Path]) -> None:
    """By default, attention, rotary positions and norms are operators of opset 23."""
    fused = {"Attention", "RotaryEmbedding", "RMSNormalization"}
    assert fused <= operators(folders["last"]) and not fused & operators(folders["all"])
    (opset,) = (own.version for own in onnx.load(folders["all"] / "model.onnx").opset_import)
    assert opset == 20


@pytest.mark.full
def test_both_generate_the_same(merged: Any, folders: dict[str, Path]) -> None:
    expected = merged.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)
    for folder in folders.values():
        assert torch.equal(load(folder, threads=1).generate(input_ids=IDS, attention_mask=MASK, **GREEDY), expected)


@pytest.mark.full
def test_logits_of_other_tokens(merged: Any, folders: dict[str, Path]) -> None:
    """They are refused before anything runs, where the graph does not compute them."""
    last, every = (load(folders[name], threads=1) for name in ("last", "all"))
    with torch.no_grad():
        expected = merged(input_ids=IDS).logits
    torch.testing.assert_close(every(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
    own = last(input_ids=IDS, logits_to_keep=1).logits
    torch.testing.assert_close(own, expected[:, -1:], rtol=1e-4, atol=1e-4)
    assert last(input_ids=IDS[:, :1]).logits.shape[1] == 1
    for count in (0, 2):
        with fails("GC145", "the logits of each row's last token only"):
            last(input_ids=IDS, logits_to_keep=count)
    row: dict[str, Any] = {"input_ids": IDS[:1], **GREEDY, "prompt_lookup_num_tokens": 2}
    assert torch.equal(every.generate(**row), merged.generate(input_ids=IDS[:1], **GREEDY))
    with fails("GC145", "the logits of each row's last token only"):
        last.generate(**row)


@pytest.mark.full
def test_texts_padded_behind(merged: Any, folders: dict[str, Path]) -> None:
    """onnxruntime-genai pads behind a text, and reads the logits of its last token."""
    og = pytest.importorskip("onnxruntime_genai", reason="without its library, there is nothing to run")
    model = og.Model(str(folders["last"]))
    rows = [IDS[0].tolist(), IDS[1, :4].tolist()]
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=13, min_length=13, batch_size=2, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens([*rows[0], *rows[1], 0, 0, 0])
    while not generator.is_done():
        generator.generate_next_token()
    for number, row in enumerate(rows):
        new = merged.generate(input_ids=torch.tensor([row]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert generator.get_sequence(number)[7:].tolist() == new[0, len(row) :].tolist()


@pytest.mark.full
@pytest.mark.parametrize("opset", [20, 23])
def test_one_head_of_keys(opset: int, tmp_path: Path) -> None:
    """torch broadcasts it to all queries, which the exporter refuses in new opsets."""
    import transformers as hf

    config = hf.FalconConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, multi_query=True
    )
    torch.manual_seed(0)
    model = hf.FalconForCausalLM(config).eval()
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}, model).eval()
    perturb(compiled, 0.5)
    folder = compiled.export(tmp_path / "falcon", "onnx-generate", opset=opset)
    expected = compiled.generate(input_ids=IDS, attention_mask=MASK, **GREEDY)
    assert torch.equal(load(folder, threads=1).generate(input_ids=IDS, attention_mask=MASK, **GREEDY), expected)


@pytest.mark.full
def test_a_length_that_the_model_fixes(tmp_path: Path) -> None:
    """MPT's code makes a mask of the captured length: no graph serves prompts and steps."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.MptForCausalLM(hf.MptConfig(vocab_size=61, d_model=16, n_heads=2, n_layers=1, max_seq_len=32)).eval()
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "ffn.up"}}]}, model).eval()
    with fails("GC140", "takes texts of 3 tokens only"):
        compiled.export(tmp_path / "mpt", "onnx-generate")
    assert not list(tmp_path.iterdir())


def test_an_option_without_effect(merged: Any, tmp_path: Path) -> None:
    with fails("GC073", "adapter_format has no effect without inputs"):
        merged.export(tmp_path / "none", "onnx-generate", adapter_format="onnx_adapter")


def test_opsets_that_are_refused(tmp_path: Path) -> None:
    compiled = adapted_source("llama")
    for number in (17, 24, "new"):
        with fails("GC073", "opset is"):
            compiled.export(tmp_path / "none", "onnx-generate", opset=number)
    packed = graftc.compile({"base": {"quantize": "int4"}, "adapt": []}, compiled.compilation.source.double().float())
    with fails("GC073", "no operators for packed weights"):
        packed.export(tmp_path / "none.onnx", opset=20)
    assert not list(tmp_path.iterdir())
