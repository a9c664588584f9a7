"""Tiny random language models of twelve families, whose generated texts do not repeat themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from graftc.testing.perturbing import randomise

VOCABULARY = 101
_TOKENS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER: dict[str, Any] = {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED: dict[str, Any] = {**_DECODER, "intermediate_size": 48, "num_key_value_heads": 2}
_WINDOWED: dict[str, Any] = {**_GROUPED, "head_dim": 12, "sliding_window": 8}
_PAIR: dict[str, Any] = {**_TOKENS, "d_model": 32, "decoder_start_token_id": 1} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}
WINDOW = 8
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""The name of the cache in calls and outputs, which depends on the release of transformers."""


def _whisper(hf: Any) -> Any:
    audio = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 100}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**_PAIR, **audio, **quiet))


_BUILD: dict[str, Callable[[Any], Any]] = {
    "llama": lambda hf: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "qwen3": lambda hf: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED, head_dim=12)),
    "gpt2": lambda hf: hf.GPT2LMHeadModel(hf.GPT2Config(**_TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=96)),
    "opt": lambda hf: hf.OPTForCausalLM(
        hf.OPTConfig(**_DECODER, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=96)
    ),
    "gemma2": lambda hf: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_WINDOWED)),
    "gemma3": lambda hf: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**_WINDOWED, layer_types=["sliding_attention", "full_attention"])
    ),
    "mixtral": lambda hf: hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "gpt_neox": lambda hf: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_DECODER, intermediate_size=48)),
    "falcon": lambda hf: hf.FalconForCausalLM(hf.FalconConfig(**_DECODER, multi_query=True)),
    "t5": lambda hf: hf.T5ForConditionalGeneration(
        hf.T5Config(**_TOKENS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda hf: hf.BartForConditionalGeneration(
        hf.BartConfig(**_PAIR, max_position_embeddings=96, forced_eos_token_id=None)
    ),
    "whisper": _whisper,
}
FAMILIES = tuple(_BUILD)
_BUILD["mistral"] = lambda hf: hf.MistralForCausalLM(hf.MistralConfig(**_WINDOWED))
_REPEATING = frozenset({"gemma2", "gemma3", "t5", "bart", "whisper"})
"""Random weights of these, whose heads are tied, go round in circles: what they have said already is less likely."""


def language_model(family: str) -> Any:
    """Return a tiny model in eval mode; the same family gives the same weights.

    Matrices are large, so that attention decides the next token; the table of a tied head is small in comparison, so
    that a token does not follow itself.
    """
    import transformers as hf

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = randomise(_BUILD[family](hf), seed=0)
        head = model.get_input_embeddings().weight  # type: ignore[operator]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.1 if parameter is head else 0.4)
    if family in _REPEATING:
        model.generation_config.repetition_penalty = 1.5
    return model.eval()


def prompt(model: Any, rows: int = 1, *, padded: bool = False, seed: int = 3) -> dict[str, Tensor]:
    """Return the inputs that a model generates from: token ids and a mask, or for Whisper audio, which is not padded.

    Rows except the first can be padded: on the left, or on the right for an encoder.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(rows, model.config.num_mel_bins, 40, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (rows, 9), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        tokens, missing = torch.arange(9), torch.tensor([0, 3, 1, 5, 2])[torch.arange(rows) % 5, None]
        mask = (tokens < 9 - missing if model.config.is_encoder_decoder else tokens >= missing).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
