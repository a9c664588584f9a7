"""The roles of the weights of small models, determined by hand: role to parameter and rows, in layer 0."""

from __future__ import annotations


def bert_like(prefix: str) -> dict[str, tuple[str, str]]:
    """Map roles to parameter and rows, in layer 0."""
    layer = f"{prefix}.encoder.layer.0"
    return {
        "embed": (f"{prefix}.embeddings.word_embeddings.weight", "all"),
        "embed.position": (f"{prefix}.embeddings.position_embeddings.weight", "all"),
        "attn.q": (f"{layer}.attention.self.query.weight", "all"),
        "attn.k": (f"{layer}.attention.self.key.weight", "all"),
        "attn.v": (f"{layer}.attention.self.value.weight", "all"),
        "attn.o": (f"{layer}.attention.output.dense.weight", "all"),
        "ffn.up": (f"{layer}.intermediate.dense.weight", "all"),
        "ffn.down": (f"{layer}.output.dense.weight", "all"),
    }


def split_qkv(layer: str, q: str, k: str, v: str, o: str) -> dict[str, tuple[str, str]]:
    return {
        f"attn.{letter}": (f"{layer}.{name}.weight", "all") for letter, name in zip("qkvo", (q, k, v, o), strict=True)
    }


def gated(layer: str) -> dict[str, tuple[str, str]]:
    return {f"ffn.{n}": (f"{layer}.mlp.{n}_proj.weight", "all") for n in ("gate", "up", "down")}


LLAMA = split_qkv("model.layers.0.self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
ENTRY = {"embed": ("model.embed_tokens.weight", "all"), "head": ("lm_head.weight", "all")}
TIED = {"embed": ("lm_head.weight", "all"), "head": ("lm_head.weight", "all")}

EXPECTED: dict[str, dict[str, tuple[str, str]]] = {
    "bert": bert_like("bert")
    | {"head": ("classifier.weight", "all"), "head.transform": ("bert.pooler.dense.weight", "all")},
    "roberta": bert_like("roberta")
    | {"head": ("classifier.out_proj.weight", "all"), "head.transform": ("classifier.dense.weight", "all")},
    "gpt2": TIED
    | {
        "embed.position": ("transformer.wpe.weight", "all"),
        "attn.q": ("transformer.h.0.attn.c_attn.weight", "0:48"),
        "attn.k": ("transformer.h.0.attn.c_attn.weight", "48:96"),
        "attn.v": ("transformer.h.0.attn.c_attn.weight", "96:144"),
        "attn.o": ("transformer.h.0.attn.c_proj.weight", "all"),
        "ffn.up": ("transformer.h.0.mlp.c_fc.weight", "all"),
        "ffn.down": ("transformer.h.0.mlp.c_proj.weight", "all"),
    },
    "llama": LLAMA | ENTRY | gated("model.layers.0"),
    "vit": split_qkv("vit.layers.0.attention", "q_proj", "k_proj", "v_proj", "o_proj")
    | {
        "embed.position": ("vit.embeddings.position_embeddings", "all"),
        "ffn.up": ("vit.layers.0.mlp.fc1.weight", "all"),
        "ffn.down": ("vit.layers.0.mlp.fc2.weight", "all"),
        "head": ("classifier.weight", "all"),
    },
    "neox": {
        "embed": ("gpt_neox.embed_in.weight", "all"),
        "attn.q": ("gpt_neox.layers.0.attention.query_key_value.weight", "0:12,36:48,72:84,108:120"),
        "attn.k": ("gpt_neox.layers.0.attention.query_key_value.weight", "12:24,48:60,84:96,120:132"),
        "attn.v": ("gpt_neox.layers.0.attention.query_key_value.weight", "24:36,60:72,96:108,132:144"),
        "attn.o": ("gpt_neox.layers.0.attention.dense.weight", "all"),
        "ffn.up": ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "all"),
        "ffn.down": ("gpt_neox.layers.0.mlp.dense_4h_to_h.weight", "all"),
        "head": ("lm_head.weight", "all"),
    },
    "phi3": ENTRY
    | {
        "attn.q": ("model.layers.0.self_attn.qkv_proj.weight", "0:48"),
        "attn.k": ("model.layers.0.self_attn.qkv_proj.weight", "48:72"),
        "attn.v": ("model.layers.0.self_attn.qkv_proj.weight", "72:96"),
        "attn.o": ("model.layers.0.self_attn.o_proj.weight", "all"),
        "ffn.gate": ("model.layers.0.mlp.gate_up_proj.weight", "0:80"),
        "ffn.up": ("model.layers.0.mlp.gate_up_proj.weight", "80:160"),
        "ffn.down": ("model.layers.0.mlp.down_proj.weight", "all"),
    },
    "opt": split_qkv("model.decoder.layers.0.self_attn", "q_proj", "k_proj", "v_proj", "out_proj")
    | TIED
    | {
        "embed.position": ("model.decoder.embed_positions.weight", "all"),
        "ffn.up": ("model.decoder.layers.0.fc1.weight", "all"),
        "ffn.down": ("model.decoder.layers.0.fc2.weight", "all"),
        "head.transform": ("model.decoder.project_out.weight", "all"),
    },
    "falcon": TIED
    | {
        "attn.q": ("transformer.h.0.self_attention.query_key_value.weight", "0:48"),
        "attn.k": ("transformer.h.0.self_attention.query_key_value.weight", "48:60"),
        "attn.v": ("transformer.h.0.self_attention.query_key_value.weight", "60:72"),
        "attn.o": ("transformer.h.0.self_attention.dense.weight", "all"),
        "ffn.up": ("transformer.h.0.mlp.dense_h_to_4h.weight", "all"),
        "ffn.down": ("transformer.h.0.mlp.dense_4h_to_h.weight", "all"),
    },
    "falcon_grouped": TIED
    | {
        "attn.q": ("transformer.h.0.self_attention.query_key_value.weight", "0:24,48:72"),
        "attn.k": ("transformer.h.0.self_attention.query_key_value.weight", "24:36,72:84"),
        "attn.v": ("transformer.h.0.self_attention.query_key_value.weight", "36:48,84:96"),
        "attn.o": ("transformer.h.0.self_attention.dense.weight", "all"),
        "ffn.up": ("transformer.h.0.mlp.dense_h_to_4h.weight", "all"),
        "ffn.down": ("transformer.h.0.mlp.dense_4h_to_h.weight", "all"),
    },
    "codegen": {
        "attn.q": ("transformer.h.0.attn.qkv_proj.weight", "0:12,36:48,72:84,108:120"),
        "attn.v": ("transformer.h.0.attn.qkv_proj.weight", "12:24,48:60,84:96,120:132"),
        "attn.k": ("transformer.h.0.attn.qkv_proj.weight", "24:36,60:72,96:108,132:144"),
        "attn.o": ("transformer.h.0.attn.out_proj.weight", "all"),
        "ffn.up": ("transformer.h.0.mlp.fc_in.weight", "all"),
        "ffn.down": ("transformer.h.0.mlp.fc_out.weight", "all"),
    },
    "bloom": TIED
    | {
        "attn.q": ("transformer.h.0.self_attention.query_key_value.weight", "0:12,36:48,72:84,108:120"),
        "attn.k": ("transformer.h.0.self_attention.query_key_value.weight", "12:24,48:60,84:96,120:132"),
        "attn.v": ("transformer.h.0.self_attention.query_key_value.weight", "24:36,60:72,96:108,132:144"),
        "attn.o": ("transformer.h.0.self_attention.dense.weight", "all"),
        "ffn.up": ("transformer.h.0.mlp.dense_h_to_4h.weight", "all"),
        "ffn.down": ("transformer.h.0.mlp.dense_4h_to_h.weight", "all"),
    },
    "gemma2": LLAMA | gated("model.layers.0") | TIED,
    "qwen3": LLAMA | gated("model.layers.0") | ENTRY,
    "mixtral": LLAMA | ENTRY | {"router": ("model.layers.0.mlp.gate.weight", "all")},
    "deepseek": ENTRY
    | gated("model.layers.0")
    | {
        "lowrank.q": ("model.layers.0.self_attn.q_a_proj.weight", "all"),
        "lowrank.kv": ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "0:16"),
        "attn.q": ("model.layers.0.self_attn.q_b_proj.weight", "all"),
        "attn.v": ("model.layers.0.self_attn.kv_b_proj.weight", "8:20,28:40,48:60,68:80"),
        "attn.o": ("model.layers.0.self_attn.o_proj.weight", "all"),
    },
    "albert": {
        role: (f"albert.encoder.albert_layer_groups.0.albert_layers.0.{name}.weight", "all")
        for role, name in (
            ("attn.q", "attention.query"),
            ("attn.k", "attention.key"),
            ("attn.v", "attention.value"),
            ("attn.o", "attention.dense"),
            ("ffn.up", "ffn"),
            ("ffn.down", "ffn_output"),
        )
    }
    | {
        "head.transform": ("albert.pooler.weight", "all"),
    },
}


def plain(layer: str, q: str, k: str, v: str, o: str, up: str, down: str) -> dict[str, tuple[str, str]]:
    """Map the roles of six linear maps of a layer to their weights, from their paths in the layer."""
    names = {"attn.q": q, "attn.k": k, "attn.v": v, "attn.o": o, "ffn.up": up, "ffn.down": down}
    return {role: (f"{layer}.{name}.weight", "all") for role, name in names.items()}


def seq2seq(model: str, up: str, down: str) -> dict[str, tuple[str, str]]:
    """Map the roles of both stacks of a model with the module names of BART."""
    encoder, decoder = f"{model}.encoder.layers.0", f"{model}.decoder.layers.0"
    names = tuple(f"{n}_proj" for n in ("q", "k", "v", "out"))
    weights = {f"encoder.{r}": w for r, w in split_qkv(f"{encoder}.self_attn", *names).items()}
    weights |= {f"decoder.{r}": w for r, w in split_qkv(f"{decoder}.self_attn", *names).items()}
    weights |= {f"decoder.cross.{r}": w for r, w in split_qkv(f"{decoder}.encoder_attn", *names).items()}
    for stack, layer in (("encoder", encoder), ("decoder", decoder)):
        weights[f"{stack}.ffn.up"] = (f"{layer}.{up}.weight", "all")
        weights[f"{stack}.ffn.down"] = (f"{layer}.{down}.weight", "all")
        weights[f"{stack}.embed.position"] = (f"{model}.{stack}.embed_positions.weight", "all")
    return weights


T5 = {
    f"{prefix}.{role}": (f"{prefix.split('.')[0]}.block.0.layer.{place}.{name}.weight", "all")
    for prefix, place, name_of, roles in (
        ("encoder", 0, "SelfAttention", "qkvo"),
        ("decoder", 0, "SelfAttention", "qkvo"),
        ("decoder.cross", 1, "EncDecAttention", "qkvo"),
    )
    for role, name in ((f"attn.{r}", f"{name_of}.{r}") for r in roles)
} | {
    f"{stack}.ffn.{role}": (f"{stack}.block.0.layer.{place}.DenseReluDense.{name}.weight", "all")
    for stack, place in (("encoder", 1), ("decoder", 2))
    for role, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))
}
SHARED = {f"ffn.{n}": (f"model.layers.0.mlp.shared_expert.{n}_proj.weight", "all") for n in ("gate", "up", "down")}
ROUTER = {"router": ("model.layers.0.mlp.gate.weight", "all")}

EXPECTED |= {
    "gptj": plain(
        "transformer.h.0", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"
    )
    | {"embed": ("transformer.wte.weight", "all"), "head": ("lm_head.weight", "all")},
    "mistral": LLAMA | ENTRY | gated("model.layers.0"),
    "qwen2": LLAMA | ENTRY | gated("model.layers.0"),
    "gemma3": LLAMA | TIED | gated("model.layers.0"),
    "qwen2_moe": LLAMA | ENTRY | SHARED | ROUTER,
    "qwen3_moe": LLAMA | ENTRY | ROUTER,
    "gpt_oss": LLAMA | ENTRY | {"router": ("model.layers.0.mlp.router.weight", "all")},
    "llama4": LLAMA
    | ENTRY
    | {"router": ("model.layers.0.feed_forward.router.weight", "all")}
    | {
        f"ffn.{n}": (f"model.layers.0.feed_forward.shared_expert.{n}_proj.weight", "all")
        for n in ("gate", "up", "down")
    },
    "distilbert": plain(
        "distilbert.transformer.layer.0",
        *(f"attention.{n}_lin" for n in ("q", "k", "v", "out")),
        "ffn.lin1",
        "ffn.lin2",
    )
    | {"head": ("classifier.weight", "all"), "head.transform": ("pre_classifier.weight", "all")},
    "electra": bert_like("electra")
    | {"head": ("classifier.out_proj.weight", "all"), "head.transform": ("classifier.dense.weight", "all")},
    "deberta_v2": plain(
        "deberta.encoder.layer.0",
        *(f"attention.self.{n}_proj" for n in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
    | {"head": ("classifier.weight", "all"), "head.transform": ("pooler.dense.weight", "all")},
    "mpnet": plain(
        "mpnet.encoder.layer.0",
        *(f"attention.attn.{n}" for n in ("q", "k", "v", "o")),
        "intermediate.dense",
        "output.dense",
    ),
    "t5": T5 | {"head": ("lm_head.weight", "all")},
    "bart": seq2seq("model", "fc1", "fc2") | {"head": ("lm_head.weight", "all")},
    "pegasus": seq2seq("model", "fc1", "fc2") | {"head": ("lm_head.weight", "all")},
    "whisper": seq2seq("model", "fc1", "fc2") | {"head": ("proj_out.weight", "all")},
    "dinov2": plain(
        "dinov2.encoder.layer.0", *(f"attention.{n}_proj" for n in ("q", "k", "v", "o")), "mlp.fc1", "mlp.fc2"
    )
    | {"embed.position": ("dinov2.embeddings.position_embeddings", "all"), "head": ("classifier.weight", "all")},
    "swin": plain(
        "swin.encoder.layers.0.blocks.0", *(f"attention.{n}_proj" for n in ("q", "k", "v", "o")), "mlp.fc1", "mlp.fc2"
    )
    | {"head": ("classifier.weight", "all")},
    "swinv2": plain(
        "swinv2.encoder.layers.0.blocks.0",
        *(f"attention.self.{n}" for n in ("query", "key", "value")),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ),
    "clip": plain(
        "vision_model.encoder.layers.0",
        *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")),
        "mlp.fc1",
        "mlp.fc2",
    )
    | {
        "embed.position": ("vision_model.embeddings.position_embedding.weight", "all"),
        "head": ("visual_projection.weight", "all"),
    },
    "clip_text": plain(
        "text_model.encoder.layers.0", *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2"
    )
    | {
        "embed": ("text_model.embeddings.token_embedding.weight", "all"),
        "embed.position": ("text_model.embeddings.position_embedding.weight", "all"),
        "head": ("text_projection.weight", "all"),
    },
    "granite": LLAMA | ENTRY | gated("model.layers.0"),
    "cohere": LLAMA | TIED | gated("model.layers.0"),
    "olmo2": LLAMA | ENTRY | gated("model.layers.0"),
    "squeezebert": plain(
        "transformer.encoder.layers.0",
        *(f"attention.{n}" for n in ("query", "key", "value")),
        "post_attention.conv1d",
        "intermediate.conv1d",
        "output.conv1d",
    ),
    "xlnet": {f"attn.{n}": (f"transformer.layer.0.rel_attn.{n}", "all") for n in "qkvo"}
    | {
        "ffn.up": ("transformer.layer.0.ff.layer_1.weight", "all"),
        "ffn.down": ("transformer.layer.0.ff.layer_2.weight", "all"),
    },
    "jamba": {"router": ("model.layers.1.feed_forward.router.weight", "all")},
    "segformer": split_qkv("segformer.stages.0.blocks.0.attention", *(f"{n}_proj" for n in ("q", "k", "v", "o"))),
}

EXPERTS: dict[str, dict[int, tuple[str, str]]] = {
    name: {
        layer: (f"model.layers.{layer}.{path}.gate_up_proj", f"model.layers.{layer}.{path}.down_proj")
        for layer in layers
    }
    for name, path, layers in (
        ("mixtral", "mlp.experts", (0, 1)),
        ("deepseek", "mlp.experts", (1,)),
        ("qwen2_moe", "mlp.experts", (0, 1)),
        ("qwen3_moe", "mlp.experts", (0, 1)),
        ("gpt_oss", "mlp.experts", (0, 1)),
        ("llama4", "feed_forward.experts", (0, 1)),
        ("jamba", "feed_forward.experts", (1,)),
    )
}

MIXERS: dict[str, tuple[str, ...]] = {
    "jamba": tuple(f"model.layers.0.mamba.{n}" for n in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")),
    "segformer": tuple(
        f"segformer.stages.{i}.blocks.0.mlp.{n}" for i in (0, 1) for n in ("fc1", "dwconv.dwconv", "fc2")
    ),
}

LAYERS: dict[tuple[str, str], set[int]] = {
    ("deepseek", "router"): {1},
    ("jamba", "router"): {1},
}
"""Layers that have a role, where it is not both."""


UNRESOLVED: dict[str, dict[str, str]] = {
    "bert": {"bert.embeddings.token_type_embeddings": "segments"},
    "roberta": {"roberta.embeddings.token_type_embeddings": "segments"},
    "opt": {"model.decoder.project_in": "residual stream itself"},
    "t5": {
        f"{s}.block.0.layer.0.SelfAttention.relative_attention_bias": "relative positions"
        for s in ("encoder", "decoder")
    },
    "albert": {
        "albert.embeddings.token_type_embeddings": "segments",
        "albert.encoder.embedding_hidden_mapping_in": "residual stream itself",
    },
    "vit": {"vit.embeddings.patch_embeddings.projection": "residual stream itself"},
    "qwen2_moe": {f"model.layers.{i}.mlp.shared_expert_gate": "gate on its residual branch" for i in (0, 1)},
    "electra": {
        "electra.embeddings.token_type_embeddings": "segments",
        "electra.embeddings_project": "residual stream itself",
    },
    "deberta_v2": {
        f"deberta.encoder.layer.{i}.attention.self.{n}_proj": f"another use of the weight is attn.{n[0]}"
        for i in (0, 1)
        for n in ("query", "key")
    },
    "mpnet": {"mpnet.encoder.relative_attention_bias": "relative positions"},
    "whisper": {f"model.encoder.conv{i}": "residual stream itself" for i in (1, 2)},
    "dinov2": {"dinov2.embeddings.patch_embeddings.projection": "residual stream itself"},
    "swin": {
        "swin.embeddings.patch_embeddings.projection": "residual stream itself",
        "swin.encoder.layers.0.downsample.reduction": "residual stream itself",
    },
    "swinv2": {
        "swinv2.embeddings.patch_embeddings.projection": "residual stream itself",
        "swinv2.encoder.layers.0.downsample.reduction": "residual stream itself",
    }
    | {
        f"swinv2.encoder.layers.{i}.blocks.{j}.attention.self.continuous_position_bias_mlp.{n}": reason
        for i, j in ((0, 0), (1, 0), (1, 1))
        for n, reason in ((0, "a constant"), (2, "scores"))
    },
    "clip": {"vision_model.embeddings.patch_embedding": "residual stream itself"},
    "squeezebert": {"transformer.embeddings.token_type_embeddings": "segments"},
    "xlnet": {f"transformer.layer.{i}.rel_attn": "scores of softmax attention" for i in (0, 1)},
    "segformer": {f"segformer.stages.{i}.patch_embeddings.proj": "residual stream itself" for i in (0, 1)}
    | {"segformer.stages.0.blocks.0.attention.sequence_reduction.sequence_reduction": "convolution over positions"},
}
