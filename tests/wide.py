"""Small models of many architectures, and what LoRA on ``attn.q``, ``attn.v`` and ``ffn.down`` has to adapt in each.

The expectations are written by hand, from the papers and the models' own code; the product knows none of them. A place
is a parameter with the rows that belong to it, ``*`` standing for layers 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor, nn

from graftc.testing.perturb import randomise

WIDTH, INNER, HEADS, VOCABULARY = 48, 80, 4, 99
HEAD = WIDTH // HEADS
_BASE = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_attention_heads": HEADS,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
_GROUPED = {**_BASE, "num_key_value_heads": 2, "pad_token_id": 0}
_SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
}
_IMAGE = {"image_size": 32, "patch_size": 8, "num_labels": 5}
_SPARSE = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}

Places = Mapping[str, str]
Q, V, DOWN, EXPERTS = "attn.q", "attn.v", "ffn.down", "experts"
USUAL = (Q, V, DOWN)


@dataclass(frozen=True)
class Wide:
    """One architecture. A parameter with two places stands there twice, the second time with a blank behind it.

    Attributes:
        build: makes the model.
        places: parameter, ``*`` for each layer, to its own rows: ``all``, or runs as text.
        roles: what the target names.
        inputs: the inputs by name, where they cannot be told from the interface.
        noise: standard deviation of what stands in for training.
    """

    build: Callable[[], nn.Module]
    places: Places
    roles: tuple[str, ...] = USUAL
    inputs: Callable[[], dict[str, Tensor]] | None = None
    noise: float = 0.2

    def model(self, seed: int = 0) -> nn.Module:
        """The model in eval mode, every parameter random; the same at every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            built = self.build()
        return randomise(built, seed=seed).eval()

    def expected(self) -> list[str]:
        """Every place with its rows, layers spelled out."""
        found = []
        for place, rows in self.places.items():
            for layer in range(2) if "*" in place else [0]:
                found.append(f"{place.strip().replace('*', str(layer))} {rows}")
        return sorted(found)


def _all(*places: str) -> dict[str, str]:
    return dict.fromkeys(places, "all")


def _heads(offset: int, width: int = HEAD, step: int = 3 * HEAD) -> str:
    """The rows of one of several projections that are interleaved by head."""
    return ",".join(f"{h * step + offset}:{h * step + offset + width}" for h in range(HEADS))


def _llama_like(*, attention: str = "self_attn") -> dict[str, str]:
    layer = "model.layers.*"
    return _all(
        f"{layer}.{attention}.q_proj.weight", f"{layer}.{attention}.v_proj.weight", f"{layer}.mlp.down_proj.weight"
    )


def _bert_like(prefix: str) -> dict[str, str]:
    layer = f"{prefix}.encoder.layer.*"
    return _all(
        f"{layer}.attention.self.query.weight", f"{layer}.attention.self.value.weight", f"{layer}.output.dense.weight"
    )


def _bart_like(encoder: str, decoder: str) -> dict[str, str]:
    own = [f"{stack}.layers.*.self_attn.{p}_proj.weight" for stack in (encoder, decoder) for p in "qv"]
    cross = [f"{decoder}.layers.*.encoder_attn.{p}_proj.weight" for p in "qv"]
    return _all(*own, *cross, f"{encoder}.layers.*.fc2.weight", f"{decoder}.layers.*.fc2.weight")


def _experts(layer: str) -> dict[str, str]:
    return _all(
        f"{layer}.self_attn.q_proj.weight",
        f"{layer}.self_attn.v_proj.weight",
        f"{layer}.mlp.experts.gate_up_proj",
        f"{layer}.mlp.experts.down_proj",
    )


class AttentionModel(nn.Module):
    """Hand-written: one pre-norm block with `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of five classes at every place of ``x``, ``[batch, sequence, width]``."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head(x + self.down(torch.relu(self.up(x))))


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _floats(name: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.zeros(2, 3, WIDTH)}


_TORCH = {
    "layers.*.self_attn.in_proj_weight": f"0:{WIDTH}",
    "layers.*.self_attn.in_proj_weight ": f"{2 * WIDTH}:{3 * WIDTH}",
    "layers.*.linear2.weight": "all",
}

FAMILIES: dict[str, Wide] = {
    "gpt_neox": Wide(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_BASE)),
        {
            "gpt_neox.layers.*.attention.query_key_value.weight": _heads(0),
            "gpt_neox.layers.*.attention.query_key_value.weight ": _heads(2 * HEAD),
            "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": "all",
        },
    ),
    "gptj": Wide(
        lambda: tf.GPTJForCausalLM(
            tf.GPTJConfig(n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=INNER, vocab_size=VOCABULARY, rotary_dim=8)
        ),
        _all(
            "transformer.h.*.attn.q_proj.weight",
            "transformer.h.*.attn.v_proj.weight",
            "transformer.h.*.mlp.fc_out.weight",
        ),
    ),
    "opt": Wide(
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(
                hidden_size=WIDTH,
                ffn_dim=INNER,
                num_attention_heads=HEADS,
                num_hidden_layers=2,
                vocab_size=VOCABULARY,
                max_position_embeddings=64,
                word_embed_proj_dim=40,
            )
        ),
        _all(
            "model.decoder.layers.*.self_attn.q_proj.weight",
            "model.decoder.layers.*.self_attn.v_proj.weight",
            "model.decoder.layers.*.fc2.weight",
        ),
    ),
    "bloom": Wide(
        lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=WIDTH, n_layer=2, n_head=HEADS, vocab_size=VOCABULARY)),
        {
            "transformer.h.*.self_attention.query_key_value.weight": _heads(0),
            "transformer.h.*.self_attention.query_key_value.weight ": _heads(2 * HEAD),
            "transformer.h.*.mlp.dense_4h_to_h.weight": "all",
        },
    ),
    "falcon": Wide(
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(
                hidden_size=WIDTH,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                ffn_hidden_size=INNER,
                vocab_size=VOCABULARY,
            )
        ),
        {
            "transformer.h.*.self_attention.query_key_value.weight": f"0:{WIDTH}",
            "transformer.h.*.self_attention.query_key_value.weight ": f"{WIDTH + HEAD}:{WIDTH + 2 * HEAD}",
            "transformer.h.*.mlp.dense_4h_to_h.weight": "all",
        },
    ),
    "phi3": Wide(
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_GROUPED)),
        {
            "model.layers.*.self_attn.qkv_proj.weight": f"0:{WIDTH}",
            "model.layers.*.self_attn.qkv_proj.weight ": f"{WIDTH + 2 * HEAD}:{WIDTH + 4 * HEAD}",
            "model.layers.*.mlp.down_proj.weight": "all",
        },
    ),
    "mistral": Wide(lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED)), _llama_like()),
    "qwen2": Wide(lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GROUPED)), _llama_like()),
    "qwen3": Wide(lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED, head_dim=16)), _llama_like()),
    "gemma2": Wide(lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GROUPED, head_dim=12)), _llama_like()),
    "gemma3": Wide(
        lambda: tf.Gemma3ForCausalLM(
            tf.Gemma3TextConfig(**_GROUPED, head_dim=12, layer_types=["sliding_attention", "full_attention"])
        ),
        _llama_like(),
    ),
    "mixtral": Wide(
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**_GROUPED, num_local_experts=4)),
        _experts("model.layers.*"),
        (Q, V, EXPERTS),
    ),
    "qwen2_moe": Wide(
        lambda: tf.Qwen2MoeForCausalLM(
            tf.Qwen2MoeConfig(**_GROUPED, **_SPARSE, num_experts=4, shared_expert_intermediate_size=56)
        ),
        {**_experts("model.layers.*"), "model.layers.*.mlp.shared_expert.down_proj.weight": "all"},
        (Q, V, DOWN, EXPERTS),
    ),
    "qwen3_moe": Wide(
        lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**_GROUPED, **_SPARSE, num_experts=4)),
        _experts("model.layers.*"),
        (Q, V, EXPERTS),
    ),
    "deepseek_v3": Wide(
        lambda: tf.DeepseekV3ForCausalLM(
            tf.DeepseekV3Config(
                **{**_BASE, "num_key_value_heads": 4},
                **_SPARSE,
                q_lora_rank=20,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=12,
                n_routed_experts=4,
                n_group=2,
                topk_group=1,
                first_k_dense_replace=1,
            )
        ),
        {
            "model.layers.*.self_attn.q_b_proj.weight": "all",
            "model.layers.*.self_attn.kv_b_proj.weight": _heads(8, 12, 20),
            "model.layers.0.mlp.down_proj.weight": "all",
            "model.layers.1.mlp.shared_experts.down_proj.weight": "all",
            "model.layers.1.mlp.experts.gate_up_proj": "all",
            "model.layers.1.mlp.experts.down_proj": "all",
        },
        (Q, V, DOWN, EXPERTS),
    ),
    "distilbert": Wide(
        lambda: tf.DistilBertForSequenceClassification(
            tf.DistilBertConfig(dim=WIDTH, hidden_dim=INNER, n_heads=HEADS, n_layers=2, vocab_size=VOCABULARY)
        ),
        _all(
            "distilbert.transformer.layer.*.attention.q_lin.weight",
            "distilbert.transformer.layer.*.attention.v_lin.weight",
            "distilbert.transformer.layer.*.ffn.lin2.weight",
        ),
    ),
    "albert": Wide(
        lambda: tf.AlbertForSequenceClassification(tf.AlbertConfig(**_BASE, embedding_size=20)),
        _all(
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value.weight",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight",
        ),
    ),
    "electra": Wide(
        lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(**_BASE, embedding_size=20)),
        _bert_like("electra"),
    ),
    "deberta_v2": Wide(
        lambda: tf.DebertaV2ForSequenceClassification(
            tf.DebertaV2Config(**_BASE, relative_attention=True, pos_att_type="p2c|c2p", position_biased_input=False)
        ),
        _all(
            "deberta.encoder.layer.*.attention.self.query_proj.weight",
            "deberta.encoder.layer.*.attention.self.value_proj.weight",
            "deberta.encoder.layer.*.output.dense.weight",
        ),
    ),
    "mpnet": Wide(
        lambda: tf.MPNetForSequenceClassification(tf.MPNetConfig(**_BASE)),
        _all(
            "mpnet.encoder.layer.*.attention.attn.q.weight",
            "mpnet.encoder.layer.*.attention.attn.v.weight",
            "mpnet.encoder.layer.*.output.dense.weight",
        ),
    ),
    "t5": Wide(
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                d_model=WIDTH, d_kv=HEAD, d_ff=INNER, num_heads=HEADS, num_layers=2, vocab_size=VOCABULARY,
                feed_forward_proj="gated-gelu", decoder_start_token_id=0,
            )
        ),
        _all(
            *(f"{stack}.block.*.layer.0.SelfAttention.{p}.weight" for stack in ("encoder", "decoder") for p in "qv"),
            *(f"decoder.block.*.layer.1.EncDecAttention.{p}.weight" for p in "qv"),
            "encoder.block.*.layer.1.DenseReluDense.wo.weight",
            "decoder.block.*.layer.2.DenseReluDense.wo.weight",
        ),
        noise=0.05,  # scores of T5 are not scaled, so it magnifies whatever enters them
    ),
    "bart": Wide(
        lambda: tf.BartForConditionalGeneration(tf.BartConfig(**_SEQ2SEQ, max_position_embeddings=64)),
        _bart_like("model.encoder", "model.decoder"),
    ),
    "pegasus": Wide(
        lambda: tf.PegasusForConditionalGeneration(tf.PegasusConfig(**_SEQ2SEQ, max_position_embeddings=64)),
        _bart_like("model.encoder", "model.decoder"),
    ),
    "whisper": Wide(
        lambda: tf.WhisperForConditionalGeneration(
            tf.WhisperConfig(
                **_SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=64, pad_token_id=0,
                bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            )
        ),
        _bart_like("model.encoder", "model.decoder"),
    ),
    "vit": Wide(
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                **{k: v for k, v in _BASE.items() if k not in ("vocab_size", "max_position_embeddings")}, **_IMAGE
            )
        ),
        _all(
            *(f"vit.layers.*.{part}.weight" for part in ("attention.q_proj", "attention.v_proj", "mlp.fc2"))
        ),
    ),
    "dinov2": Wide(
        lambda: tf.Dinov2ForImageClassification(
            tf.Dinov2Config(
                hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=2, mlp_ratio=2, layerscale_value=0.5,
                **_IMAGE,
            )
        ),
        _all(
            "dinov2.encoder.layer.*.attention.q_proj.weight",
            "dinov2.encoder.layer.*.attention.v_proj.weight",
            "dinov2.encoder.layer.*.mlp.fc2.weight",
        ),
    ),
    "swin": Wide(
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(
                image_size=32, patch_size=2, embed_dim=24, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=5
            )
        ),
        _all(
            *(
                f"swin.encoder.layers.{stage}.blocks.{block}.{part}.weight"
                for stage, block in ((0, 0), (0, 1), (1, 0))
                for part in ("attention.q_proj", "attention.v_proj", "mlp.fc2")
            )
        ),
    ),
    "clip": Wide(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(
                text_config={**_BASE, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
                vision_config={
                    "hidden_size": 40, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
                    "image_size": 32, "patch_size": 8,
                },
                projection_dim=24,
            )
        ),
        _all(
            *(
                f"{tower}_model.encoder.layers.*.{part}.weight"
                for tower in ("text", "vision")
                for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc2")
            )
        ),
    ),
    "multihead_attention": Wide(
        AttentionModel,
        {
            "attention.in_proj_weight": f"0:{WIDTH}",
            "attention.in_proj_weight ": f"{2 * WIDTH}:{3 * WIDTH}",
            "down.weight": "all",
        },
        inputs=_floats("x"),
    ),
    "encoder_post_norm": Wide(lambda: _encoder(False), _TORCH, inputs=_floats("src")),
    "encoder_pre_norm": Wide(lambda: _encoder(True), _TORCH, inputs=_floats("src")),
}  # fmt: skip
"""Every architecture by name."""
