"""Files written for a decoder's graph: the config of onnxruntime-genai, and transformers' `ExportedModel` folder."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import DynamicCache, GenerationConfig, GPT2Config, LlamaConfig, Qwen3Config, T5Config

from graftc.runtime.onnx_generation import genai_config, genai_obstacle, load, write_exported_model
from graftc.runtime.onnx_generation.exported import MANIFEST
from graftc.specs.errors.diagnostics import GraftError
from tests.runtime.onnx_generation import onnx_toy as toy

IDS = torch.tensor([[3, 4, 5, 6], [7, 7, 9, 3]])
ONES = torch.ones(2, 4, dtype=torch.int64)
PLACES = torch.arange(4).expand(2, -1)


class TestGenai:
    """The config that onnxruntime-genai reads; the library itself is not run here."""

    INPUTS = ("input_ids", "attention_mask", *(f"past_key_values.{i}.{p}" for i in (0, 1) for p in ("key", "value")))
    OUTPUTS = ("logits", *(f"present.{i}.{p}" for i in (0, 1) for p in ("key", "value")))

    def written(self, config: Any, inputs: tuple[str, ...] = INPUTS, **defaults: Any) -> Any:
        result = genai_config(config, GenerationConfig(**defaults), "model.onnx", inputs, self.OUTPUTS)
        return json.loads(json.dumps(result))

    def test_a_decoder(self) -> None:
        """Sizes come from the config, defaults from the generation config, and inputs are only those of the graph."""
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(**sizes, vocab_size=61, max_position_embeddings=96, bos_token_id=1, eos_token_id=2)
        assert self.written(config, eos_token_id=[5, 6], do_sample=True, temperature=0.5) == {
            "model": {
                "bos_token_id": 1,
                "context_length": 96,
                "decoder": {
                    "filename": "model.onnx",
                    "head_size": 6,
                    "hidden_size": 24,
                    "inputs": {
                        "attention_mask": "attention_mask",
                        "input_ids": "input_ids",
                        "past_key_names": "past_key_values.%d.key",
                        "past_value_names": "past_key_values.%d.value",
                    },
                    "num_attention_heads": 4,
                    "num_hidden_layers": 2,
                    "num_key_value_heads": 2,
                    "outputs": {
                        "logits": "logits",
                        "present_key_names": "present.%d.key",
                        "present_value_names": "present.%d.value",
                    },
                    "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                },
                "eos_token_id": [5, 6],
                "pad_token_id": 5,
                "type": "llama",
                "vocab_size": 61,
            },
            "search": {
                "diversity_penalty": 0.0,
                "do_sample": True,
                "early_stopping": True,
                "length_penalty": 1.0,
                "max_length": 96,
                "min_length": 0,
                "no_repeat_ngram_size": 0,
                "num_beams": 1,
                "num_return_sequences": 1,
                "past_present_share_buffer": False,
                "repetition_penalty": 1.0,
                "temperature": 0.5,
                "top_k": 50,
                "top_p": 1.0,
            },
        }

    def test_heads_that_are_wider_than_the_model(self) -> None:
        config = Qwen3Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=6, pad_token_id=0)
        model = self.written(config, (*self.INPUTS, "position_ids"))["model"]
        assert (model["type"], model["decoder"]["head_size"], model["pad_token_id"]) == ("qwen3", 6, 0)
        assert model["decoder"]["inputs"]["position_ids"] == "position_ids" and "eos_token_id" not in model

    @pytest.mark.parametrize(
        ("config", "inputs", "why"),
        [
            (GPT2Config(n_layer=2), INPUTS, "does not know models of type gpt2"),
            (T5Config(num_layers=2), INPUTS, "does not know models of type t5"),
            (LlamaConfig(num_hidden_layers=3), INPUTS, "no past_key_values for 3 layers"),
            (LlamaConfig(num_hidden_layers=2), INPUTS[:-1], "no past_key_values for 2 layers"),
            (LlamaConfig(num_hidden_layers=2), (*INPUTS, "token_type_ids"), "does not provide token_type_ids"),
        ],
        ids=["gpt2", "t5", "layers", "half", "input"],
    )
    def test_what_the_library_cannot_run(self, config: Any, inputs: tuple[str, ...], why: str) -> None:
        assert why in str(genai_obstacle(config, inputs, self.OUTPUTS))
        assert self.written(config, inputs) is None
        assert genai_obstacle(LlamaConfig(num_hidden_layers=2), self.INPUTS, self.OUTPUTS) is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    return write_exported_model(toy.write(root / "optimum"), root / "exported")


def test_an_older_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.exporters", ModuleType("transformers.exporters"))
    with pytest.raises(GraftError, match=r"GC061.*has no ExportedModel"):
        write_exported_model(toy.write(tmp_path / "optimum"), tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.skipif(Version(version("transformers")) < Version("5.23"), reason="needs transformers 5.23: ExportedModel")
class TestExportedModel:
    """A folder that transformers reads."""

    @pytest.mark.slow
    def test_transformers_runs_it(self, folder: Path) -> None:
        """A prompt runs, and then a later token with the cache that the prompt returned."""
        from transformers.exporters import ExportedModel

        model = ExportedModel.from_pretrained(folder)
        assert (model.dtype, model.device.type) == (torch.float32, "cpu")
        assert model.config.model_type == "gpt2" and model.generation_config.eos_token_id == 22
        empty, cache = torch.zeros(2, 1, 0, toy.WIDTH), DynamicCache()
        cache.update(empty, empty, 0)
        first = model(input_ids=IDS[:, :3], attention_mask=ONES[:, :3], position_ids=PLACES[:, :3], cache=cache)
        second = model(input_ids=IDS[:, 3:], attention_mask=ONES, position_ids=PLACES[:, 3:], cache=first.cache)
        logits = torch.cat([first.logits, second.logits], 1)
        torch.testing.assert_close(logits, toy.logits(IDS, ONES), rtol=0, atol=1e-5)
        assert type(second.cache) is DynamicCache and second.cache.get_seq_length() == 4

    def test_it_generates_too(self, folder: Path) -> None:
        tokens = load(folder, threads=1).generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(tokens, toy.greedy(IDS, ONES, 6))

    def test_destinations(self, folder: Path, tmp_path: Path) -> None:
        """An existing destination is replaced only on request, and only if it is such a folder."""
        source = folder.parent / "optimum"
        with pytest.raises(GraftError, match="GC063"):
            write_exported_model(source, folder)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes").touch()
        with pytest.raises(GraftError, match="GC063"):
            write_exported_model(source, tmp_path / "mine", force=True)
        first = write_exported_model(source, tmp_path / "again")
        assert write_exported_model(source, first, force=True) == first
        with pytest.raises(GraftError, match="GC144"):
            write_exported_model(toy.write(tmp_path / "none", toy.model(cached=False)), tmp_path / "never")
        with pytest.raises(GraftError, match="GC144"):
            write_exported_model(tmp_path, tmp_path / "never")
        assert not (tmp_path / "never").exists()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"export_format": "dynamo"}, "names no ONNX file"),
            ({"components": {"prefill": {"file": "model.onnx"}}}, "names no ONNX file"),
            ({"components": {"model": {"file": "../optimum/model.onnx"}}}, "not beside it"),
            ({"components": {"model": {"file": 3}}}, "not beside it"),
            ({"components": 3}, "cannot be read"),
        ],
        ids=["format", "component", "elsewhere", "number", "type"],
    )
    def test_manifests_that_are_wrong(self, folder: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        manifest = json.loads((folder / MANIFEST).read_text())
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(GraftError, match=f"GC144: .*{words}"):
            load(tmp_path)
