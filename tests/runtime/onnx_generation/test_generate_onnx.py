"""Generation over ONNX Runtime with a hand-written decoder: results, and refused calls and folders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from graftc.runtime.onnx_generation import OnnxCausalLM, load
from tests.kit.language_models import CACHE
from tests.runtime.onnx_generation import onnx_toy as toy
from tests.runtime.onnx_generation.onnx_toy import MASK, PROMPTS, TOKENS, fails, generated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder, threads=1)


def test_greedy_with_padding_is_what_whole_rows_give(model: Any) -> None:
    expected = toy.greedy(PROMPTS, MASK, TOKENS)
    assert torch.equal(generated(model, PROMPTS, MASK), expected)
    assert len(set(expected[:, 4:].flatten().tolist())) > 4, "the toy has to say more than one thing"


def test_a_step_gives_the_logits_of_whole_rows(model: Any) -> None:
    """A prompt, one token and several tokens give these logits, all or the last ones, and fill the given cache."""
    ids, mask = toy.greedy(PROMPTS, MASK, 4), torch.cat([MASK, torch.ones(3, 4, dtype=torch.int64)], 1)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    expected, cache = toy.logits(ids, mask), DynamicCache()
    for start, end in ((0, 4), (4, 5), (5, 8)):
        step = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], "position_ids": places[:, start:end]}
        outputs = model(**step, cache=cache)
        assert outputs[CACHE] is cache and cache.get_seq_length() == end
        torch.testing.assert_close(outputs.logits, expected[:, start:end], rtol=0, atol=1e-5)
    assert model(input_ids=ids, attention_mask=mask, logits_to_keep=2).logits.shape == (3, 2, toy.VOCABULARY)
    assert model(input_ids=ids, use_cache=False).get(CACHE) is None
    # Without a mask and positions, a row has no padding and begins at 0.
    torch.testing.assert_close(model(input_ids=ids).logits, toy.logits(ids, torch.ones_like(mask)), rtol=0, atol=1e-5)


def test_presents_are_pasts_without_a_copy(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses that a step binds are those of the last step's outputs."""
    cache = model(input_ids=PROMPTS)[CACHE]
    given = {t.data_ptr() for t in (cache.layers[0].keys, cache.layers[0].values)}
    bound: list[int] = []
    bind = model.decoder_graph._bind

    def watched(*args: Any) -> Any:
        buffer = bind(*args)
        bound.append(buffer.data_ptr())
        return buffer

    monkeypatch.setattr(model.decoder_graph, "_bind", watched)
    model(input_ids=PROMPTS[:, :1], cache=cache)
    assert given <= set(bound)


def test_a_build_without_dlpack_gives_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.delattr(onnxruntime.OrtValue, "__dlpack__", raising=False)
    assert torch.equal(generated(model, PROMPTS, MASK), toy.greedy(PROMPTS, MASK, TOKENS))


def test_ways_of_generating_agree(model: Any) -> None:
    """Prompt look-up, an assistant, chunks and no cache give greedy tokens, and the best beam is at least as likely."""
    row, expected = PROMPTS[1:2], toy.greedy(PROMPTS[1:2], MASK[1:2], TOKENS)
    for options in (
        {"prompt_lookup_num_tokens": 2},
        {"assistant_model": model},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
        {"do_sample": True, "top_k": 1},
        {"generation_config": GenerationConfig(max_new_tokens=TOKENS)},
    ):
        assert torch.equal(generated(model, row, MASK[1:2], **options), expected), options
    beams = generated(model, row, MASK[1:2], num_beams=4, num_return_sequences=2)
    assert beams.shape == (2, 4 + TOKENS) and not torch.equal(beams[0], beams[1])
    assert likelihood(beams[0]) >= max(likelihood(beams[1]), likelihood(expected[0])) - 1e-4


def likelihood(row: torch.Tensor) -> float:
    scores = toy.logits(row[None], torch.ones_like(row[None])).log_softmax(-1)[0, 3:-1]
    return float(scores.gather(-1, row[4:, None]).sum())


def test_a_seed_repeats_a_sample(model: Any) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return generated(model, PROMPTS, MASK, do_sample=True, num_return_sequences=2).tolist()

    assert sample(1) == sample(1) != sample(2)


def test_streamers_and_criteria_are_called(model: Any) -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.values: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.values += value.flatten().tolist()

        def end(self) -> None:
            self.values.append(-1)

    class Six(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 6)

    streamer = Kept()
    tokens = generated(model, PROMPTS[1:2], streamer=streamer, stopping_criteria=[Six()], min_new_tokens=None)
    assert streamer.values == [*tokens[0].tolist(), -1] and tokens.shape == (1, 6)


def test_a_cache_goes_on(model: Any) -> None:
    """A filled cache is continued; the sliding layers of a cache made from a config are replaced while empty."""
    cache = DynamicCache(config=model.config)
    first = generated(model, PROMPTS[1:2], **{CACHE: cache})
    more = generated(model, first, max_new_tokens=3, min_new_tokens=3, **{CACHE: cache})
    assert torch.equal(more, toy.greedy(PROMPTS[1:2], MASK[1:2], TOKENS + 3))


def test_defaults_come_from_the_folder(model: Any, folder: Path) -> None:
    assert model.generation_config.eos_token_id == 22 and model.config.vocab_size == toy.VOCABULARY
    assert isinstance(model, OnnxCausalLM) and type(model).__name__ == "GPT2LMHeadModel"
    assert model.device == torch.device("cpu") and model.dtype == torch.float32 and model.to("cpu") is model


def test_a_pipeline_takes_it(model: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(toy.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", padding_side="left")
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    outputs = pipe("w3 w4 w5 w6", max_new_tokens=5, do_sample=False, eos_token_id=None, return_tensors=True)
    assert outputs[0]["generated_token_ids"] == toy.greedy(PROMPTS[1:2], MASK[1:2], 5)[0].tolist()


class TestCaches:
    """Another model's cache, or one of another kind, is refused before anything runs."""

    @pytest.mark.parametrize(
        ("shape", "words"),
        [
            ((3, 2, 4, toy.WIDTH), "keys of layer 0 in the cache are"),
            ((3, 1, 4, 5), "but the graph takes"),
            ((2, 1, 4, toy.WIDTH), "keys of layer 0"),
        ],
    )
    def test_of_other_sizes(self, model: Any, shape: tuple[int, ...], words: str) -> None:
        cache = DynamicCache()
        cache.update(torch.zeros(shape), torch.zeros(shape), 0)
        with fails("GC140", words):
            model(input_ids=PROMPTS, cache=cache)

    def test_of_another_type_or_depth(self, model: Any) -> None:
        cache = DynamicCache()
        half = torch.zeros(3, 1, 4, toy.WIDTH, dtype=torch.float16)
        cache.update(half, half, 0)
        with fails("GC140", "float16"):
            model(input_ids=PROMPTS, cache=cache)
        cache = DynamicCache()
        for layer in range(2):
            cache.update(half.float(), half.float(), layer)
        with fails("GC140", "2 layers"):
            model(input_ids=PROMPTS, cache=cache)

    def test_of_another_kind(self, model: Any) -> None:
        static = StaticCache(config=model.config, max_cache_len=8)
        static.update(torch.zeros(3, 1, 1, toy.WIDTH), torch.zeros(3, 1, 1, toy.WIDTH), 0)
        for cache, words in (
            (static, "StaticLayer"),
            (EncoderDecoderCache(DynamicCache(), DynamicCache()), "EncoderDecoderCache"),
            (((PROMPTS, PROMPTS),), "tuple"),
        ):
            with fails("GC140", words):
                model(input_ids=PROMPTS, cache=cache)
        with fails("GC140", "do not support a static cache"):
            generated(model, PROMPTS, cache_implementation="static")


class TestCalls:
    """Calls that do not fit the graph."""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"input_ids": None}, "input_ids is missing"),
            ({"input_ids": PROMPTS[0]}, r"input_ids is \[4\]"),
            ({"input_ids": PROMPTS[:, :0]}, "input_ids is"),
            ({"attention_mask": MASK[:, :3]}, r"attention_mask is \[3, 3\]"),
            ({"output_hidden_states": True}, "output_hidden_states"),
            ({"inputs_embeds": torch.zeros(3, 4, 6)}, "inputs_embeds"),
            ({"return_dict": False}, "return_dict=False"),
            ({"logits_to_keep": torch.tensor([0, 2])}, "is not a number of last tokens"),
            ({"input_ids": PROMPTS + toy.VOCABULARY}, "is not in the vocabulary of 23"),
            ({"input_ids": PROMPTS - 30}, "token -30"),
            ({"position_ids": PROMPTS[:2]}, r"position_ids is \[2, 4\]"),
        ],
    )
    def test_inputs(self, model: Any, changes: dict[str, Any], words: str) -> None:
        with fails("GC145", words):
            model(**{"input_ids": PROMPTS, "attention_mask": MASK, **changes})

    def test_casts(self, model: Any) -> None:
        with fails("GC073", "cannot be cast to torch.float16"):
            model.to(torch.float16)

    def test_what_the_loop_passes_on(self, model: Any) -> None:
        """The tokenizer for stop strings is none of the graph's inputs."""
        expected = generated(model, PROMPTS[:1], MASK[:1])
        assert torch.equal(generated(model, PROMPTS[:1], MASK[:1], tokenizer=object()), expected)

    def test_positions_beyond_the_table(self, model: Any) -> None:
        """The length of a row is its number of tokens without padding."""
        with fails("GC143", f"token {toy.POSITIONS + 1} of a row"):
            generated(model, PROMPTS[1:2], max_new_tokens=toy.POSITIONS, min_new_tokens=toy.POSITIONS)
        new = toy.POSITIONS - 1
        tokens = generated(model, PROMPTS[:1], MASK[:1], max_new_tokens=new, min_new_tokens=new)
        assert torch.equal(tokens, toy.greedy(PROMPTS[:1], MASK[:1], new))


class TestFolders:
    """Wrong or hostile folders raise a coded error, and nothing in them is run or read from elsewhere."""

    def test_what_is_missing(self, tmp_path: Path) -> None:
        for path, words in ((tmp_path / "none", "is not a folder"), (tmp_path, "has no model.onnx")):
            with fails("GC144", words):
                load(path)
        (toy.write(tmp_path / "t") / "encoder_model.onnx").touch()
        with fails("GC144", "no decoder_model.onnx and no decoder_with_past_model.onnx"):
            load(tmp_path / "t")
        (toy.write(tmp_path / "c") / "config.json").unlink()
        with fails("GC144", "config.json"):
            load(tmp_path / "c")

    @pytest.mark.parametrize("content", [b"", b"no graph", b"\x08\x07" * 40, bytes(range(256)) * 20])
    def test_no_onnx(self, tmp_path: Path, content: bytes) -> None:
        (toy.write(tmp_path / "t") / "model.onnx").write_bytes(content)
        with fails("GC144", ""):
            load(tmp_path / "t")

    def test_no_cache(self, tmp_path: Path) -> None:
        graph = toy.model(cached=False)
        with fails("GC144", "does not return past_key_values.0.key"):
            load(toy.write(tmp_path / "half", graph))
        identity = helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
        value = helper.make_tensor_value_info
        ends = [[value(n, t, ["b", "s"])] for n, t in (("input_ids", TensorProto.INT64), ("logits", TensorProto.FLOAT))]
        plain = helper.make_model(
            helper.make_graph([identity], "g", *ends), ir_version=9, opset_imports=[helper.make_opsetid("", 17)]
        )
        with fails("GC144", "does not take the keys and values"):
            load(toy.write(tmp_path / "plain", plain))
        plain.graph.output[0].name = plain.graph.node[0].output[0] = "scores"
        with fails("GC144", "no output logits; it has scores"):
            load(toy.write(tmp_path / "scores", plain))

    def test_inputs_that_no_call_gives(self, tmp_path: Path) -> None:
        graph = toy.model()
        graph.graph.input.append(helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1]))
        with fails("GC144", "use_cache_branch"):
            load(toy.write(tmp_path / "t", graph))

    def test_a_config_of_another_kind(self, tmp_path: Path) -> None:
        with fails("GC144", "an encoder and a decoder"):
            load(toy.write(tmp_path / "t", model_type="t5"))

    def test_code_in_the_folder_is_not_run(self, tmp_path: Path) -> None:
        """The config names code, there is code for `generate`, and only code could define the model type."""
        evil = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        maps = {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
        for name, config in (("known", maps), ("unknown", {**maps, "model_type": "evil"})):
            folder = toy.write(tmp_path / name, **config)
            (folder / "evil.py").write_text(evil)
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(evil)
            if name == "known":
                assert torch.equal(generated(load(folder), PROMPTS, MASK), toy.greedy(PROMPTS, MASK, TOKENS))
            else:
                with fails("GC144", "config.json"):
                    load(folder)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("way", ["..", "absolute", "link"])
    def test_weights_outside_the_folder_are_not_read(self, tmp_path: Path, way: str) -> None:
        """A file inside the folder is read, but not once it has been moved out."""
        folder = toy.write(tmp_path / "t")
        onnx.save(toy.model(), folder / "model.onnx", save_as_external_data=True, location="w.bin", size_threshold=100)
        assert torch.equal(generated(load(folder), PROMPTS, MASK), toy.greedy(PROMPTS, MASK, TOKENS))
        moved = (folder / "w.bin").rename(tmp_path / "w.bin")
        if way == "link":
            (folder / "w.bin").symlink_to(moved)
        else:
            graph = onnx.load(folder / "model.onnx", load_external_data=False)
            for tensor in graph.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = str(moved) if way == "absolute" else "../w.bin"
            (folder / "model.onnx").write_bytes(graph.SerializeToString())
        with fails("GC144", "External data path validation failed"):
            load(folder)

    def test_arguments(self, folder: Path) -> None:
        for options, words in (
            ({"threads": 0}, "threads is 0"),
            ({"threads": "2"}, "threads is of type str"),
            ({"providers": ["CPUExecutionProvidr"]}, "no execution provider"),
        ):
            with fails("GC073", words):
                load(folder, **options)
        with fails("GC073", "the path must be a non-empty string"):
            load(3)  # type: ignore[arg-type]
        with fails("GC073", "not on meta"):
            load(folder, providers=["CPUExecutionProvider"]).to("meta")

    def test_without_onnxruntime(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with fails("GC061", "onnxruntime"):
            load(folder)
