"""Generation over ONNX Runtime with a hand-written encoder and decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from transformers import DynamicCache, EncoderDecoderCache

from graftc.runtime.onnx_generation import load
from tests.kit.language_models import CACHE
from tests.runtime.onnx_generation import onnx_toy as toy
from tests.runtime.onnx_generation.onnx_toy import MASK, PROMPTS, TOKENS, fails, generated


class TestEncoderAndDecoder:
    """Keys and values of the encoder's states are computed only in the first step."""

    START = torch.ones(3, 1, dtype=torch.int64)

    @pytest.fixture
    def pair(self, tmp_path: Path) -> Any:
        return load(toy.write_seq2seq(tmp_path / "t"), threads=1)

    @pytest.mark.slow
    def test_greedy_with_padding_is_what_whole_rows_give(self, pair: Any) -> None:
        expected = toy.seq2seq_greedy(PROMPTS, MASK, self.START, TOKENS)
        assert torch.equal(generated(pair, PROMPTS, MASK), expected)
        assert torch.equal(generated(pair, PROMPTS, MASK, use_cache=False), expected)
        assert len(set(expected.flatten().tolist())) > 4 and expected.unique(dim=0).shape[0] == 3
        row = {"ids": PROMPTS[1:2], "mask": MASK[1:2]}
        assert torch.equal(generated(pair, **row, prompt_lookup_num_tokens=2), expected[1:2])
        assert torch.equal(generated(pair, **row, assistant_model=pair), expected[1:2])
        assert generated(pair, PROMPTS, MASK, num_beams=3, num_return_sequences=2).shape == (6, 1 + TOKENS)

    def test_steps(self, pair: Any) -> None:
        """The decoder takes a prompt, then several tokens; the encoder's keys and values are computed once."""
        given, cache = (
            toy.seq2seq_greedy(PROMPTS, MASK, self.START, 5),
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
        )
        expected = toy.seq2seq_logits(PROMPTS, MASK, given)
        states = pair.get_encoder()(PROMPTS, MASK)
        first = pair(encoder_outputs=states, attention_mask=MASK, decoder_input_ids=given[:, :2], cache=cache)
        kept = cache.cross_attention_cache.layers[0].keys.data_ptr()
        second = pair(encoder_outputs=states, attention_mask=MASK, decoder_input_ids=given[:, 2:], cache=cache)
        torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected, rtol=0, atol=1e-5)
        assert second[CACHE] is cache and cache.cross_attention_cache.layers[0].keys.data_ptr() == kept
        assert cache.is_updated == {0: True} and cache.get_seq_length() == 6

    def test_what_does_not_fit(self, pair: Any) -> None:
        call = {"input_ids": PROMPTS, "attention_mask": MASK, "decoder_input_ids": self.START}
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        filled = torch.zeros(3, 1, 2, toy.WIDTH)
        cache.self_attention_cache.update(filled, filled, 0)
        for code, words, changes in (
            ("GC140", "DynamicCache", {"cache": DynamicCache()}),
            ("GC140", "nothing from the encoder", {"cache": cache}),
            ("GC145", "decoder_input_ids is missing", {"decoder_input_ids": None}),
            ("GC145", "input_ids is missing", {"input_ids": None}),
            ("GC145", "takes no decoder_attention_mask", {"decoder_attention_mask": torch.zeros(3, 1)}),
            ("GC145", "attention_mask is", {"attention_mask": MASK[:, 1:]}),
            ("GC145", "is not in the vocabulary", {"decoder_input_ids": self.START * 99}),
        ):
            with fails(code, words):
                pair(**{**call, **changes})

    def test_graphs_that_do_not_go_together(self, tmp_path: Path) -> None:
        for name, output, words in (
            ("encoder_model.onnx", "last_hidden_state", "no output last_hidden_state"),
            ("decoder_model.onnx", "present.0.encoder.value", "does not return what decoder_with_past_model.onnx"),
            ("decoder_with_past_model.onnx", "present.0.decoder.key", "is incomplete"),
        ):
            graphs = toy.seq2seq()
            outputs = graphs[name].graph.output
            position = [v.name for v in outputs].index(output)
            outputs[position].CopyFrom(
                helper.make_tensor_value_info("embedded", TensorProto.FLOAT, ["b", "n", toy.WIDTH])
            )
            with fails("GC144", words):
                load(toy.write_seq2seq(tmp_path / name, graphs))
