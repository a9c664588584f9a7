"""Create ``genai_config.json``, which onnxruntime-genai reads from the folder of a decoder's ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graftc.runtime.onnx_generation.io_names import optimum_name, slots_of

# The library's names for model types (src/models/model_type.h), by transformers' names. GPT-2 is omitted, since for
# it the library stores a layer's keys and values in one tensor.
_TYPES = {
    "ernie4_5": "ernie4_5",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3_text",
    "gpt_oss": "gptoss",
    "granite": "granite",
    "llama": "llama",
    "mistral": "mistral",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "phi": "phi",
    "phi3": "phi3",
    "phimoe": "phimoe",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}

_INPUTS = ("input_ids", "attention_mask", "position_ids")

# The library's search options and their defaults.
_SEARCH: dict[str, Any] = {
    "do_sample": False,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def genai_obstacle(config: Any, inputs: Sequence[str], outputs: Sequence[str]) -> str | None:
    """Return the reason why onnxruntime-genai cannot run a graph, or None if it can.

    Args:
        config: the model's transformers config.
        inputs: the names of the graph's inputs.
        outputs: the names of the graph's outputs.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _TYPES:
        return f"onnxruntime-genai does not know models of type {kind}"
    layers = config.num_hidden_layers
    past, present = slots_of(inputs), slots_of(outputs)
    for slots, side, names in ((past, "past_key_values", inputs), (present, "present", outputs)):
        wanted = {optimum_name(slot, side) for slot in slots}  # type: ignore[arg-type]
        if len(slots) != 2 * layers or not wanted <= set(names) or any(s.attention != "self" for s in slots):
            return f"the graph has no {side} for {layers} layers, with a key and a value each"
    if strange := sorted(set(inputs) - set(past.values()) - set(_INPUTS)):
        return f"onnxruntime-genai does not provide {', '.join(strange)}"
    if "logits" not in outputs:
        return "the graph has no logits"
    return None


def genai_config(
    config: Any,
    generation_config: Any,
    filename: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> dict[str, Any] | None:
    """Return the contents of ``genai_config.json`` for a decoder's graph whose inputs and outputs have Optimum's names.

    Args:
        config: the model's transformers config.
        generation_config: the model's generation defaults, which become the defaults of the search.
        filename: the name of the graph's file, which is in the same folder as the result and the tokenizer.
        inputs: the names of the graph's inputs.
        outputs: the names of the graph's outputs.

    Returns:
        Plain data for ``json.dumps``; None if `genai_obstacle` returns a reason. Past and present are separate tensors
        (``past_present_share_buffer`` is off), and the search ends at the model's ``max_position_embeddings``.
    """
    if genai_obstacle(config, inputs, outputs) is not None:
        return None
    heads = config.num_attention_heads
    length = config.max_position_embeddings
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": filename,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_size": config.hidden_size,
        "inputs": {
            **{name: name for name in _INPUTS if name in inputs},
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
    }
    search = {name: _value(generation_config, name, default) for name, default in _SEARCH.items()}
    own = {"diversity_penalty": 0.0, "early_stopping": True, "max_length": length, "past_present_share_buffer": False}
    return {
        "model": {
            **_special_tokens(config, generation_config),
            "context_length": length,
            "decoder": decoder,
            "type": _TYPES[config.model_type],
            "vocab_size": config.vocab_size,
        },
        "search": dict(sorted({**search, **own}.items())),
    }


def _value(config: Any, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value


def _special_tokens(config: Any, generation_config: Any) -> dict[str, Any]:
    """Return the known special tokens; without a padding token, the end token is used for padding."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    tokens = {name: _value(generation_config, name, getattr(config, name, None)) for name in names}
    end = tokens["eos_token_id"]
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = end[0] if isinstance(end, list) and end else end
    return {name: token for name, token in tokens.items() if token is not None}
