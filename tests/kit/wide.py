"""Small models of many architectures, and what LoRA on ``attn.q``, ``attn.v`` and ``ffn.down`` has to adapt in each.

The expectations are written by hand, from the papers and the models' own code; none of them comes from the product. A
place is a parameter with the rows that belong to it; ``*`` represents layers 0 and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor, nn

from graftc.testing.perturbing import randomise
from tests.compiler.structure_models import BASE, HEADS, INNER, MODELS, D

HEAD = D // HEADS

Places = Mapping[str, str]
Q, V, DOWN, EXPERTS = "attn.q", "attn.v", "ffn.down", "experts"
USUAL = (Q, V, DOWN)


@dataclass(frozen=True)
class Wide:
    """One architecture. A parameter with two places is listed twice, the second time with a trailing blank.

    Attributes:
        build: a function that returns the model.
        places: the adapted rows (``all`` or ranges as text) by parameter, with ``*`` for each layer.
        roles: the roles of the target.
        inputs: a function that returns the inputs by name, if they cannot be derived from the interface.
        noise: the standard deviation of the random values that represent training.
    """

    build: Callable[[], nn.Module]
    places: Places
    roles: tuple[str, ...] = USUAL
    inputs: Callable[[], dict[str, Tensor]] | None = None
    noise: float = 0.2

    def model(self, seed: int = 0) -> nn.Module:
        """Return the model in eval mode with random values in every parameter, the same at every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            built = self.build()
        return randomise(built, seed=seed).eval()

    def expected(self) -> list[str]:
        """Return every place with its rows, with layer numbers filled in."""
        lines = []
        for place, rows in self.places.items():
            for layer in range(2) if "*" in place else [0]:
                lines.append(f"{place.strip().replace('*', str(layer))} {rows}")
        return sorted(lines)


def _all(*places: str) -> dict[str, str]:
    return dict.fromkeys(places, "all")


def _heads(offset: int, width: int = HEAD, step: int = 3 * HEAD) -> str:
    """Return the rows of one of several projections that are interleaved by head."""
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
    """A hand-written model: one pre-norm block with `nn.MultiheadAttention`."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.up = nn.Linear(D, INNER)
        self.down = nn.Linear(INNER, D)
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of five classes at every position of ``x``, ``[batch, sequence, width]``."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return self.head(x + self.down(torch.relu(self.up(x))))


def _encoder(norm_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, HEADS, INNER, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _floats(name: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.zeros(2, 3, D)}


_TORCH = {
    "layers.*.self_attn.in_proj_weight": f"0:{D}",
    "layers.*.self_attn.in_proj_weight ": f"{2 * D}:{3 * D}",
    "layers.*.linear2.weight": "all",
}

FAMILIES: dict[str, Wide] = {
    "gpt_neox": Wide(
        MODELS["neox"],
        {
            "gpt_neox.layers.*.attention.query_key_value.weight": _heads(0),
            "gpt_neox.layers.*.attention.query_key_value.weight ": _heads(2 * HEAD),
            "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": "all",
        },
    ),
    "gptj": Wide(
        MODELS["gptj"],
        _all(
            "transformer.h.*.attn.q_proj.weight",
            "transformer.h.*.attn.v_proj.weight",
            "transformer.h.*.mlp.fc_out.weight",
        ),
    ),
    "opt": Wide(
        MODELS["opt"],
        _all(
            "model.decoder.layers.*.self_attn.q_proj.weight",
            "model.decoder.layers.*.self_attn.v_proj.weight",
            "model.decoder.layers.*.fc2.weight",
        ),
    ),
    "bloom": Wide(
        MODELS["bloom"],
        {
            "transformer.h.*.self_attention.query_key_value.weight": _heads(0),
            "transformer.h.*.self_attention.query_key_value.weight ": _heads(2 * HEAD),
            "transformer.h.*.mlp.dense_4h_to_h.weight": "all",
        },
    ),
    "falcon": Wide(
        MODELS["falcon"],
        {
            "transformer.h.*.self_attention.query_key_value.weight": f"0:{D}",
            "transformer.h.*.self_attention.query_key_value.weight ": f"{D + HEAD}:{D + 2 * HEAD}",
            "transformer.h.*.mlp.dense_4h_to_h.weight": "all",
        },
    ),
    "phi3": Wide(
        MODELS["phi3"],
        {
            "model.layers.*.self_attn.qkv_proj.weight": f"0:{D}",
            "model.layers.*.self_attn.qkv_proj.weight ": f"{D + 2 * HEAD}:{D + 4 * HEAD}",
            "model.layers.*.mlp.down_proj.weight": "all",
        },
    ),
    "mistral": Wide(MODELS["mistral"], _llama_like()),
    "qwen2": Wide(MODELS["qwen2"], _llama_like()),
    "qwen3": Wide(MODELS["qwen3"], _llama_like()),
    "gemma2": Wide(MODELS["gemma2"], _llama_like()),
    "gemma3": Wide(
        MODELS["gemma3"],
        _llama_like(),
    ),
    "mixtral": Wide(
        MODELS["mixtral"],
        _experts("model.layers.*"),
        (Q, V, EXPERTS),
    ),
    "qwen2_moe": Wide(
        MODELS["qwen2_moe"],
        {**_experts("model.layers.*"), "model.layers.*.mlp.shared_expert.down_proj.weight": "all"},
        (Q, V, DOWN, EXPERTS),
    ),
    "qwen3_moe": Wide(
        MODELS["qwen3_moe"],
        _experts("model.layers.*"),
        (Q, V, EXPERTS),
    ),
    "deepseek_v3": Wide(
        MODELS["deepseek"],
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
        MODELS["distilbert"],
        _all(
            "distilbert.transformer.layer.*.attention.q_lin.weight",
            "distilbert.transformer.layer.*.attention.v_lin.weight",
            "distilbert.transformer.layer.*.ffn.lin2.weight",
        ),
    ),
    "albert": Wide(
        MODELS["albert"],
        _all(
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value.weight",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output.weight",
        ),
    ),
    "electra": Wide(
        MODELS["electra"],
        _bert_like("electra"),
    ),
    "deberta_v2": Wide(
        MODELS["deberta_v2"],
        _all(
            "deberta.encoder.layer.*.attention.self.query_proj.weight",
            "deberta.encoder.layer.*.attention.self.value_proj.weight",
            "deberta.encoder.layer.*.output.dense.weight",
        ),
    ),
    "mpnet": Wide(
        MODELS["mpnet"],
        _all(
            "mpnet.encoder.layer.*.attention.attn.q.weight",
            "mpnet.encoder.layer.*.attention.attn.v.weight",
            "mpnet.encoder.layer.*.output.dense.weight",
        ),
    ),
    "t5": Wide(
        MODELS["t5"],
        _all(
            *(f"{stack}.block.*.layer.0.SelfAttention.{p}.weight" for stack in ("encoder", "decoder") for p in "qv"),
            *(f"decoder.block.*.layer.1.EncDecAttention.{p}.weight" for p in "qv"),
            "encoder.block.*.layer.1.DenseReluDense.wo.weight",
            "decoder.block.*.layer.2.DenseReluDense.wo.weight",
        ),
        noise=0.05,  # scores of T5 are not scaled, so the noise is magnified
    ),
    "bart": Wide(
        MODELS["bart"],
        _bart_like("model.encoder", "model.decoder"),
    ),
    "pegasus": Wide(
        MODELS["pegasus"],
        _bart_like("model.encoder", "model.decoder"),
    ),
    "whisper": Wide(
        MODELS["whisper"],
        _bart_like("model.encoder", "model.decoder"),
    ),
    "vit": Wide(
        MODELS["vit"],
        _all(
            *(f"vit.layers.*.{part}.weight" for part in ("attention.q_proj", "attention.v_proj", "mlp.fc2"))
        ),
    ),
    "dinov2": Wide(
        MODELS["dinov2"],
        _all(
            "dinov2.encoder.layer.*.attention.q_proj.weight",
            "dinov2.encoder.layer.*.attention.v_proj.weight",
            "dinov2.encoder.layer.*.mlp.fc2.weight",
        ),
    ),
    "swin": Wide(
        MODELS["swin"],
        _all(
            *(
                f"swin.encoder.layers.{stage}.blocks.{block}.{part}.weight"
                for stage, block in ((0, 0), (1, 0), (1, 1))
                for part in ("attention.q_proj", "attention.v_proj", "mlp.fc2")
            )
        ),
    ),
    "clip": Wide(
        lambda: tf.CLIPModel(
            tf.CLIPConfig(
                text_config={**BASE, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0},
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
            "attention.in_proj_weight": f"0:{D}",
            "attention.in_proj_weight ": f"{2 * D}:{3 * D}",
            "down.weight": "all",
        },
        inputs=_floats("x"),
    ),
    "encoder_post_norm": Wide(lambda: _encoder(False), _TORCH, inputs=_floats("src")),
    "encoder_pre_norm": Wide(lambda: _encoder(True), _TORCH, inputs=_floats("src")),
}  # fmt: skip
"""Every architecture by name."""
