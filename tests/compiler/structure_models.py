"""Small models of many families."""

from __future__ import annotations

from collections.abc import Callable

import transformers as tf
from torch import nn

D, INNER, HEADS, VOCABULARY = 48, 80, 4, 99
BASE = {
    "hidden_size": D, "intermediate_size": INNER, "num_attention_heads": HEADS, "num_hidden_layers": 2,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2, "pad_token_id": 0}
GPT = {"n_embd": D, "n_layer": 2, "n_head": HEADS, "n_inner": INNER, "vocab_size": VOCABULARY, "n_positions": 64}
SEQ2SEQ = {
    "d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}  # fmt: skip
MOE = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 1}
VISION = {"hidden_size": D, "num_attention_heads": HEADS, "num_hidden_layers": 2, "image_size": 12, "patch_size": 4}
SWIN = {
    "embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "window_size": 2, "image_size": 32, "patch_size": 4,
    "mlp_ratio": 2.0, "num_labels": 5,
}  # fmt: skip

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**BASE, num_labels=5)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**BASE, num_labels=5)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=D, intermediate_size=INNER, num_attention_heads=HEADS, num_hidden_layers=2, image_size=12,
            patch_size=4, num_labels=5,
        )
    ),
    "neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**BASE)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GROUPED)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=D, ffn_dim=INNER, num_attention_heads=HEADS, num_hidden_layers=2, vocab_size=VOCABULARY,
            max_position_embeddings=64, word_embed_proj_dim=40,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=D, d_kv=12, d_ff=INNER, num_heads=HEADS, num_layers=2, vocab_size=VOCABULARY,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0,
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**SEQ2SEQ)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=VOCABULARY)
    ),
    "falcon_grouped": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(
            hidden_size=D, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=VOCABULARY, num_kv_heads=2,
            new_decoder_architecture=True,
        )
    ),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(**GPT, rotary_dim=8)),
    "bloom": lambda: tf.BloomForCausalLM(
        tf.BloomConfig(hidden_size=D, n_layer=2, n_head=HEADS, vocab_size=VOCABULARY)
    ),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**GROUPED, head_dim=12)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GROUPED, head_dim=16)),
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GROUPED, num_local_experts=4)),
    "deepseek": lambda: tf.DeepseekV3ForCausalLM(
        tf.DeepseekV3Config(
            **BASE | {"num_key_value_heads": 4}, moe_intermediate_size=20, q_lora_rank=20, kv_lora_rank=16,
            qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, n_routed_experts=4, n_group=2, topk_group=1,
            num_experts_per_tok=2, first_k_dense_replace=1,
        )
    ),
    "albert": lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**BASE, embedding_size=20)),
    "gptj": lambda: tf.GPTJForCausalLM(tf.GPTJConfig(**GPT, rotary_dim=8)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GROUPED, sliding_window=4)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**GROUPED)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(
            **GROUPED, head_dim=12, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        )
    ),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=28)),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, head_dim=16)),
    "gpt_oss": lambda: tf.GptOssForCausalLM(
        tf.GptOssConfig(**GROUPED, head_dim=12, num_local_experts=4, sliding_window=4)
    ),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **GROUPED, head_dim=12, num_local_experts=4, intermediate_size_mlp=40, interleave_moe_layer_step=1
        )
    ),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(
            dim=D, hidden_dim=INNER, n_heads=HEADS, n_layers=2, vocab_size=VOCABULARY, max_position_embeddings=64
        )
    ),
    "electra": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**BASE, embedding_size=20)),
    "deberta_v2": lambda: tf.DebertaV2ForSequenceClassification(
        tf.DebertaV2Config(
            **BASE, relative_attention=True, position_buckets=8, pos_att_type="p2c|c2p", share_att_key=True,
            norm_rel_ebd="layer_norm", pooler_hidden_size=D,
        )
    ),
    "mpnet": lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**BASE)),
    "pegasus": lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**SEQ2SEQ, decoder_start_token_id=0)),
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(
            d_model=D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=INNER, decoder_ffn_dim=64, vocab_size=VOCABULARY,
            num_mel_bins=8, max_source_positions=6, max_target_positions=64, decoder_start_token_id=0,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, suppress_tokens=None, begin_suppress_tokens=None,
        )
    ),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**VISION, mlp_ratio=2, num_labels=5)),
    "swin": lambda: tf.SwinForImageClassification(tf.SwinConfig(**SWIN)),
    "swinv2": lambda: tf.Swinv2ForImageClassification(tf.Swinv2Config(**SWIN)),
    "clip": lambda: tf.CLIPVisionModelWithProjection(
        tf.CLIPVisionConfig(**VISION, intermediate_size=INNER, projection_dim=28)
    ),
    "clip_text": lambda: tf.CLIPTextModelWithProjection(
        tf.CLIPTextConfig(**BASE, projection_dim=28, eos_token_id=2, bos_token_id=0, pad_token_id=1)
    ),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**GROUPED, residual_multiplier=0.5)),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**GROUPED, eos_token_id=2)),
    "olmo2": lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**GROUPED, eos_token_id=2)),
    "squeezebert": lambda: tf.SqueezeBertForSequenceClassification(tf.SqueezeBertConfig(**BASE, embedding_size=D)),
    "xlnet": lambda: tf.XLNetForSequenceClassification(
        tf.XLNetConfig(vocab_size=VOCABULARY, d_model=D, n_layer=2, n_head=HEADS, d_inner=INNER)
    ),
    "jamba": lambda: tf.JambaForCausalLM(
        tf.JambaConfig(
            **GROUPED, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1, num_experts=4,
            num_experts_per_tok=2, mamba_d_state=4, mamba_dt_rank=6,
        )
    ),
    "segformer": lambda: tf.SegformerForImageClassification(
        tf.SegformerConfig(
            hidden_sizes=[16, 32], depths=[1, 1], sr_ratios=[2, 1], num_attention_heads=[2, 4], patch_sizes=[3, 3],
            strides=[4, 2], mlp_ratios=[2, 2], num_encoder_blocks=2,
        )
    ),
}  # fmt: skip
