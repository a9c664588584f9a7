"""The meaning of a config's fields, derived from their names."""

from __future__ import annotations

import re

LAYERS = re.compile(r"(^|_)(n_layers?|num_layers|hidden_layers|encoder_layers|decoder_layers|depth)$")
HEADS = re.compile(r"(^|_)(n_heads?|(attention|kv|key|value|key_value|num|mamba|linear_num)_heads?|num_heads|n_heads)$")
HEAD_SIZES = re.compile(r"(^|_)(head_dim|d_head|headdim|d_kv|dim_head|head_size|rotary_dim|kv_channels)$")
INTERVALS = re.compile(r"^(max_window_layers|no_rope_layer_interval|global_attn_every_n_layers)$")
EXPERTS = re.compile(r"(^|_)(num_experts|n_routed_experts|num_local_experts|zero_expert_num)$")
TOP_EXPERTS = re.compile(r"(^|_)(experts_per_tok(en)?|moe_(topk|top_k|k))$")
VOCABULARIES = re.compile(r"vocab(_size|$)")
TOKENS = re.compile(r"(token_id|token_index|_index|_id)$")
POSITION_COUNTS = re.compile(r"(max|n|text|speech|source|target)_.*positions?(_embeddings)?$|^n_positions$|^n_ctx$")
WINDOWS = re.compile(
    r"^(sliding_window(_size)?|swa_window|attention_window(_size)?|attention_chunk_size|local_attention|(lsh|local)_attn_chunk_length)$"
)
WIDTHS = re.compile(
    r"(dim|dims|size|sizes|channels|width|inner|ff|dff|rank|embd|model|ssm|filters|d_latents)(_mlp|_global)?$"
)
NOT_WIDTHS = re.compile(
    r"vocab|kernel|image|patch|window|chunk|block|group|batch|frame|num_channels|in_channels|audio_channels|pool|mel"
    r"|seq|crop|context|train_size|input_channels|capacity|codebook_size|shape|type_|coordinate|hop|sample|state_size"
    r"|d_state|num_latent|feature_size|stem_num|output_num|_model_max|unit_size|segment|codevector|xvector|tdnn"
)
PLACES = re.compile(r"^(image|video|audio)_(token|patch)_(id|index)$")
FEATURE_LAYERS = re.compile(r"(vision|image|audio)_feature_layers?$")
INDEXED = re.compile(r"^index_topk$")
PINPOINTS = re.compile(r"_pinpoints$")
TOKENS_OF_IMAGES = re.compile(r"^mm_tokens_per_image$")
OF_THE_TEXT = re.compile(r"^out_hidden_size$")
"""Widths of a tower's output, which have to equal the text's width."""
