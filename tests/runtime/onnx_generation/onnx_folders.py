"""Tiny random models whose generated texts do not repeat themselves, and adapted versions of them."""

from __future__ import annotations

from typing import Any

import torch

from graftc.testing.perturbing import perturb

VOCABULARY = 61
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_DECODER, **_TOKENS, "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 96}


def source(family: str) -> Any:
    """Return a tiny model with seeded weights, large enough that greedy search does not repeat itself."""
    import transformers as hf

    match family:
        case "llama":
            model = hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA))
        case "qwen3":
            model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=6))
        case "gpt2":
            sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 96}
            model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **_TOKENS))
        case "t5":
            sizes = {"d_model": 16, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
            special = {"decoder_start_token_id": 0, "eos_token_id": 50, "pad_token_id": 0}
            model = hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **special))
        case _:
            raise KeyError(family)
    # T5's head is its token embedding: large vectors there would make every token repeat itself.
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5)
        if family == "t5":
            model.shared.weight.normal_(0, 0.1)
    return model.eval()


def adapted_source(family: str) -> Any:
    """Return `source` with LoRA on roles that every family has, far from its initial values."""
    import graftc

    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}]}
    compiled = graftc.compile(spec, source(family)).eval()
    perturb(compiled, 0.3)
    return compiled
