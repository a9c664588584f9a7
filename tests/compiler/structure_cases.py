"""Small models of many families, and the roles that their weights have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers as tf
from torch import Tensor, fx, nn

from graftc.compiler.capture import capture
from graftc.compiler.flow import Flow
from graftc.compiler.signature import Axis
from graftc.compiler.structure import Structure, find_structure
from graftc.passes.core.program import map_nodes
from graftc.passes.core.shapes import Sizes

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
}  # fmt: skip


def bert_like(prefix: str) -> dict[str, tuple[str, str]]:
    """Role to parameter and rows, in layer 0."""
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
    "t5": {
        "encoder.attn.q": ("encoder.block.0.layer.0.SelfAttention.q.weight", "all"),
        "decoder.attn.k": ("decoder.block.0.layer.0.SelfAttention.k.weight", "all"),
        "decoder.cross.attn.q": ("decoder.block.0.layer.1.EncDecAttention.q.weight", "all"),
        "decoder.cross.attn.k": ("decoder.block.0.layer.1.EncDecAttention.k.weight", "all"),
        "decoder.cross.attn.v": ("decoder.block.0.layer.1.EncDecAttention.v.weight", "all"),
        "decoder.cross.attn.o": ("decoder.block.0.layer.1.EncDecAttention.o.weight", "all"),
        "encoder.ffn.gate": ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "all"),
        "encoder.ffn.up": ("encoder.block.0.layer.1.DenseReluDense.wi_1.weight", "all"),
        "decoder.ffn.down": ("decoder.block.0.layer.2.DenseReluDense.wo.weight", "all"),
        "head": ("lm_head.weight", "all"),
    },
    "bart": {
        "encoder.attn.v": ("model.encoder.layers.0.self_attn.v_proj.weight", "all"),
        "decoder.attn.q": ("model.decoder.layers.0.self_attn.q_proj.weight", "all"),
        "decoder.cross.attn.k": ("model.decoder.layers.0.encoder_attn.k_proj.weight", "all"),
        "encoder.embed.position": ("model.encoder.embed_positions.weight", "all"),
        "encoder.ffn.up": ("model.encoder.layers.0.fc1.weight", "all"),
        "decoder.ffn.up": ("model.decoder.layers.0.fc1.weight", "all"),
    },
    "falcon": TIED
    | {
        "attn.q": ("transformer.h.0.self_attention.query_key_value.weight", "0:48"),
        "attn.k": ("transformer.h.0.self_attention.query_key_value.weight", "48:60"),
        "attn.v": ("transformer.h.0.self_attention.query_key_value.weight", "60:72"),
        "attn.o": ("transformer.h.0.self_attention.dense.weight", "all"),
        "ffn.down": ("transformer.h.0.mlp.dense_4h_to_h.weight", "all"),
    },
    "codegen": {
        "attn.q": ("transformer.h.0.attn.qkv_proj.weight", "0:12,36:48,72:84,108:120"),
        "attn.v": ("transformer.h.0.attn.qkv_proj.weight", "12:24,48:60,84:96,120:132"),
        "attn.k": ("transformer.h.0.attn.qkv_proj.weight", "24:36,60:72,96:108,132:144"),
        "ffn.up": ("transformer.h.0.mlp.fc_in.weight", "all"),
    },
    "bloom": {
        "attn.q": ("transformer.h.0.self_attention.query_key_value.weight", "0:12,36:48,72:84,108:120"),
        "attn.k": ("transformer.h.0.self_attention.query_key_value.weight", "12:24,48:60,84:96,120:132"),
        "attn.v": ("transformer.h.0.self_attention.query_key_value.weight", "24:36,60:72,96:108,132:144"),
        "ffn.up": ("transformer.h.0.mlp.dense_h_to_4h.weight", "all"),
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
        "attn.q": ("albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query.weight", "all"),
        "ffn.up": ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", "all"),
        "head.transform": ("albert.pooler.weight", "all"),
    },
}

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
}


@dataclass
class Captured:
    """A small model, its graph and roles, and its tensors by name."""

    graph: fx.Graph
    structure: Structure
    tensors: dict[str, Tensor]
    axes: tuple[Axis, ...]
    flow: Flow = field(init=False)

    def __post_init__(self) -> None:
        self.flow = Flow(self.graph, Sizes(lambda _: 2))

    def run(self, changed: Mapping[str, Tensor] | None = None) -> dict[fx.Node, Any]:
        """Every value of the graph, with some tensors replaced."""
        generator = torch.Generator().manual_seed(0)
        tensors = self.tensors | dict(changed or {})
        inputs = {a.name: example(a, generator) for a in self.axes}
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "placeholder":
                    values[node] = inputs[node.name]
                elif node.op == "get_attr":
                    values[node] = tensors[str(node.target)]
                elif node.op == "call_function":
                    args = map_nodes(node.args, values.__getitem__)
                    values[node] = node.target(*args, **map_nodes(node.kwargs, values.__getitem__))
        return values


def example(axis: Axis, generator: torch.Generator) -> Tensor:
    sizes = {"batch": 2, "sequence": 5, "target_sequence": 4}
    shape = [sizes[a] if isinstance(a, str) else a for a in axis.axes]
    if axis.dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    if "mask" in axis.name:
        return torch.ones(shape, dtype=axis.dtype)
    return torch.randint(3, VOCABULARY, shape, generator=generator)


def captured(model: nn.Module, axes: list[Axis] | None = None) -> Captured:
    found = capture(model, axes, mode="eval")
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors = {name: t.detach() for name, t in tensors.items()} | found.constants
    program = found.program
    inputs = tuple(Axis(i.name, i.dtype, i.shape) for i in program.inputs)
    return Captured(program.graph, find_structure(program.graph, found.constants), tensors, inputs)


@cache
def family(name: str) -> Captured:
    torch.manual_seed(0)
    return captured(MODELS[name]())


VALUES = [Axis("x", torch.float32, ("batch", "sequence", D))]


class Misnamed(nn.Module):
    """Attention spelled out, with names that lie and a fused, interleaved projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict(self.parts()) for _ in range(2)])
        self.embedding = nn.Linear(D, 7)

    @staticmethod
    def parts() -> dict[str, nn.Module]:
        return {
            "v_proj": nn.Linear(D, D),
            "down_proj": nn.Linear(D, 2 * D),
            "gate": nn.Linear(D, D, bias=False),
            "q_proj": nn.Linear(D, INNER),
            "o_proj": nn.Linear(INNER, D),
        }

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            batch, length, _ = x.shape
            query = layer["v_proj"](x).view(batch, length, HEADS, -1).transpose(1, 2)
            both = layer["down_proj"](x).view(batch, length, D // HEADS, HEADS, 2)
            key, value = (both[..., i].permute(0, 3, 1, 2) for i in (1, 0))
            weights = torch.softmax(query @ key.transpose(-1, -2) / 3.0, -1)
            mixed = (weights @ value).transpose(1, 2).reshape(batch, length, D)
            x = x + layer["gate"](mixed)
            x = x + layer["o_proj"](torch.relu(layer["q_proj"](x)))
        logits: Tensor = self.embedding(x)
        return logits


class Packed(nn.Module):
    """PyTorch's own layers, which read slices of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, HEADS, INNER, batch_first=True), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(D, HEADS, INNER, batch_first=True), 2)
        self.out = nn.Linear(D, 7)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        logits: Tensor = self.out(self.decoder(y, self.encoder(x), tgt_mask=mask, tgt_is_causal=True))
        return logits


class Einsum(nn.Module):
    """Attention in index notation: keys written in place, scores plus a bias that depends on the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleList([nn.Linear(D, D) for _ in range(3)] + [nn.Linear(D, D, bias=False)]) for _ in range(2)]
        )

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor | None = None
        for first, second, third, last in self.layers:  # type: ignore[misc]
            heads = [f(x).unflatten(-1, (HEADS, -1)) for f in (first, second, third)]
            key = torch.zeros_like(heads[1])
            key[..., :5] = heads[1][..., 7:]
            key[..., 5:] = heads[2][..., 5:]
            scores = torch.einsum("bqhd,bkhd->bhqk", heads[0], key)
            bias = scores if bias is None else bias
            weights = torch.softmax(scores + bias, -1)
            mixed = torch.einsum("bhqk,bkhd->bqhd", weights, heads[2])
            x = x + last(mixed.flatten(-2))
        return x


class Odd(nn.Module):
    """Residual branches of no known form."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(D, INNER), nn.Linear(INNER, INNER), nn.Linear(INNER, D)
        self.lone = nn.Linear(D, D)
        self.left, self.right, self.join = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)
        self.plain, self.other, self.last = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)
        self.halves, self.close = nn.Linear(D, 2 * INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.third(torch.relu(self.second(torch.relu(self.first(x)))))
        x = x + self.lone(x)
        x = x + self.join(self.left(x) + torch.relu(self.right(x)))
        x = x + self.last(self.plain(x) * self.other(x))
        return x + self.close(nn.functional.glu(self.halves(x)))
