"""Random configurations of the installed peft, for every family of methods.

The models are decoders, encoders, encoder-decoders, mixtures of experts, tied models and a convolutional network. A
case passes if the import gives peft's outputs, gradients and merged outputs, and peft reads the export as the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import peft
import torch
from torch import Tensor, nn

from graftc.testing import tiny
from graftc.testing.perturbing import randomise
from tests.kit.releases import peft_config

Rng = random.Random


class Convolutions(nn.Module):
    """A model of images: plain, grouped and depthwise convolutions, then attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 24, 1)
        self.line = nn.Conv1d(24, 24, 3, padding=1)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.norm = nn.LayerNorm(24)
        self.fc = nn.Linear(24, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, 5]`` of images ``[batch, 3, 8, 8]``."""
        hidden = torch.tanh(self.grouped(torch.tanh(self.stem(images))))
        hidden = torch.tanh(self.point(torch.tanh(self.depthwise(hidden)))).flatten(2)
        hidden = torch.tanh(self.line(hidden)).transpose(1, 2)
        hidden = self.norm(hidden + self.attention(hidden, hidden, hidden, need_weights=False)[0])
        logits: Tensor = self.head(torch.tanh(self.fc(hidden)).mean(1))
        return logits


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.1}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))


def _llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    sizes = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 40, "intermediate_size_mlp": 80}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1, "initializer_range": 0.1, "moe_layers": [0, 1]}
    return Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts, pad_token_id=0))


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"vocab_size": 101, "d_model": 48, "encoder_ffn_dim": 80, "decoder_ffn_dim": 80, "init_std": 0.1}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    words = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return BartForConditionalGeneration(BartConfig(**sizes, **layers, **words, max_position_embeddings=64))


_OWN: Mapping[str, Callable[[], nn.Module]] = {
    "qwen3_moe": _qwen3_moe,
    "llama4": _llama4,
    "bart": _bart,
    "tied": lambda: tiny("llama", tie_word_embeddings=True),
    "convs": Convolutions,
}


@cache
def base(family: str) -> nn.Module:
    """Return a tiny model, which is shared and must not be written to."""
    if family not in _OWN:
        return tiny(family)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = _OWN[family]()
    return model.eval() if family == "tied" else randomise(model, seed=0).eval()


def examples(family: str) -> Any:
    """Return inputs for capturing a model that defines none of its own."""
    return (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)),) if family == "convs" else None


LINEAR: Mapping[str, list[str]] = {
    "bert": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "roberta": ["query", "key", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"],
    "tied": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "llama4": ["q_proj", "v_proj", "o_proj"],
    "t5": ["q", "k", "v", "wi", "wo"],
    "bart": ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
    "convs": ["stem", "point", "line", "fc"],
}
NORMS: Mapping[str, list[str]] = {
    **{"bert": ["LayerNorm"], "roberta": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"], "t5": ["layer_norm"]},
    **{"gpt_neox": ["input_layernorm"], "llama": ["norm", "input_layernorm"], "vit": ["layernorm_before", "layernorm"]},
    **{"mixtral": ["norm", "post_attention_layernorm"], "bart": ["final_layer_norm"], "convs": ["norm"]},
    **{"tied": ["norm"], "qwen3_moe": ["q_norm", "input_layernorm"]},
}
TABLES: Mapping[str, str] = {
    **{"bert": "word_embeddings", "roberta": "word_embeddings", "gpt2": "wte", "gpt_neox": "embed_in"},
    **{"llama": "embed_tokens", "mixtral": "embed_tokens", "tied": "embed_tokens", "t5": "shared", "bart": "shared"},
    **{"qwen3_moe": "embed_tokens"},
}
HEADS: Mapping[str, str] = {
    **{"bert": "classifier", "roberta": "classifier", "vit": "classifier", "llama": "lm_head", "mixtral": "lm_head"},
    **{"convs": "head", "gpt_neox": "embed_out"},
}
LAYERED: Mapping[str, str] = {
    **{"bert": "layer", "roberta": "layer", "gpt2": "h", "gpt_neox": "layers", "llama": "layers", "vit": "layers"},
    **{"tied": "layers", "mixtral": "layers", "qwen3_moe": "layers", "bart": "layers"},
}
ENCODERS, DECODERS = ("bert", "roberta", "vit"), ("gpt2", "gpt_neox", "llama", "tied", "mixtral", "qwen3_moe")
PAIRS, EXPERTS = ("t5", "bart"), ("mixtral", "qwen3_moe")
EVERY = tuple(LINEAR)
TEXT = tuple(family for family in EVERY if family not in ("vit", "convs"))
FIVE = ("bert", "gpt2", "gpt_neox", "llama", "vit")


def some(family: str, rng: Rng, most: int = 3) -> list[str]:
    return sorted(rng.sample(LINEAR[family], rng.randint(1, min(most, len(LINEAR[family])))))


def _turned(family: str) -> dict[str, Any]:
    return {"fan_in_fan_out": True} if family == "gpt2" else {}


def lora(family: str, rng: Rng, **fields: Any) -> Any:
    own = {"r": rng.randint(1, 9), "lora_alpha": rng.choice([1, 8, 16, 7]), "target_modules": some(family, rng)}
    return peft.LoraConfig(**{**own, **_turned(family), **fields})


def patterns(family: str, rng: Rng) -> Any:
    modules = some(family, rng)
    key = rf"{LAYERED[family]}\.1\..*{modules[0]}"
    return lora(
        family,
        rng,
        target_modules=modules,
        rank_pattern={key: rng.randint(1, 4)},
        alpha_pattern={modules[-1]: rng.randint(2, 30)},
        use_rslora=rng.random() < 0.5,
    )


def _expert_names(family: str) -> dict[str, list[str]]:
    up = ["w1", "w3"] if family == "mixtral" else ["gate_proj", "up_proj"]
    return {"up": up, "down": ["w2"] if family == "mixtral" else ["down_proj"]}


def experts(family: str, rng: Rng) -> Any:
    """Draw a config that names the experts' layers before fusion, which peft turns into parameters."""
    names = _expert_names(family)
    chosen = rng.choice([names["up"], names["down"], names["up"] + names["down"]])
    more = rng.choice([[], ["q_proj"], ["q_proj", "v_proj"]])
    return lora(family, rng, target_modules=chosen + more, use_rslora=rng.random() < 0.3)


def parameters(family: str, rng: Rng) -> Any:
    """Draw a config that names parameters of experts and of the router, with or without the path before them."""
    names = {
        "llama4": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    }.get(family, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    if rng.random() < 0.5:
        names = [name.rpartition(".")[2] for name in names]
    router = {"mixtral": "mlp.gate.weight", "qwen3_moe": "mlp.gate.weight", "llama4": "router.weight"}[family]
    chosen = rng.sample(names, rng.randint(1, 2)) + ([router] if rng.random() < 0.5 and family != "llama4" else [])
    patterns = {"rank_pattern": {chosen[0]: rng.randint(1, 5)}} if rng.random() < 0.4 else {}
    return lora(family, rng, target_parameters=chosen, target_modules=rng.choice([[], ["q_proj"]]), **patterns)


def tied_target(family: str, rng: Rng) -> Any:
    """Draw a config with the table as a target; the head of a tied model gets it transposed."""
    return lora(family, rng, target_modules=[TABLES[family], LINEAR[family][0]], ensure_weight_tying=True)


def tied_saved(family: str, rng: Rng) -> Any:
    saved = rng.choice([[TABLES[family], "lm_head"], [TABLES[family]]])
    ensured = len(saved) == 1 or rng.random() < 0.5
    return lora(family, rng, modules_to_save=saved, ensure_weight_tying=ensured)


def tokens(family: str, rng: Rng) -> Any:
    rows = rng.sample(range(101), rng.randint(1, 25))
    given: Any = rows if family not in ("bert", "roberta") and rng.random() < 0.5 else {TABLES[family]: rows}
    return lora(family, rng, trainable_token_indices=given, ensure_weight_tying=rng.random() < 0.3)


def bias(family: str, rng: Rng) -> Any:
    return lora(family, rng, bias=rng.choice(["all", "lora_only"]))


def layers(family: str, rng: Rng) -> Any:
    more = {"layers_pattern": LAYERED[family]} if rng.random() < 0.5 else {}
    return lora(family, rng, layers_to_transform=rng.choice([0, 1, [0], [1]]), **more)


def expression(family: str, rng: Rng) -> Any:
    return lora(family, rng, target_modules=rf".*\.(?:{'|'.join(some(family, rng))})")


def excluded(family: str, rng: Rng) -> Any:
    modules = sorted(rng.sample(LINEAR[family], 2))
    out = rng.choice([[modules[0]], rf".*{LAYERED[family]}\.0\..*"])
    return lora(family, rng, target_modules=modules, exclude_modules=out)


def starts(family: str, rng: Rng) -> Any:
    word = rng.choice(["gaussian", "orthogonal", True, False])
    return lora(family, rng, r=rng.choice([2, 4, 6]), init_lora_weights=word)


def virtual(kind: str, **fields: Any) -> Callable[[str, Rng], Any]:
    def make(family: str, rng: Rng) -> Any:
        task = "SEQ_2_SEQ_LM" if family in PAIRS else "CAUSAL_LM"
        given = {name: value(rng) if callable(value) else value for name, value in fields.items()}
        return getattr(peft, kind)(task_type=task, num_virtual_tokens=rng.randint(1, 6), **given)

    return make


def convolutions(family: str, rng: Rng) -> Any:
    """Draw a config for convolutions; with groups, peft requires ranks that they divide."""
    modules = rng.sample(["stem", "grouped", "depthwise", "point", "line"], 2)
    rank = 16 if "depthwise" in modules else rng.choice([4, 8])
    return lora(family, rng, target_modules=modules, r=rank)


def ia3(family: str, rng: Rng) -> Any:
    modules = [name for name in some(family, rng) if name != "line"] or ["fc"]
    inner = rng.sample(modules, 1) if rng.random() < 0.7 else []
    return peft.IA3Config(target_modules=modules, feedforward_modules=inner, **_turned(family))


def adalora(family: str, rng: Rng) -> Any:
    own = {"init_r": rng.randint(3, 8), "target_r": 2, "lora_alpha": rng.choice([4, 9]), "total_step": 20}
    return peft.AdaLoraConfig(**own, target_modules=some(family, rng), **_turned(family))


def vera(family: str, rng: Rng) -> Any:
    own = {"r": rng.choice([3, 64]), "projection_prng_key": rng.randint(0, 99), "save_projection": rng.random() < 0.5}
    modules = LINEAR[family][:1] if family == "convs" else some(family, rng)
    return peft.VeraConfig(**own, target_modules=["fc"] if family == "convs" else modules, **_turned(family))


def product(kind: str, **fields: Any) -> Callable[[str, Rng], Any]:
    def make(family: str, rng: Rng) -> Any:
        own = {"r": rng.randint(1, 6), "alpha": rng.choice([3, 8]), "target_modules": some(family, rng)}
        if rng.random() < 0.4:
            own["rank_pattern"] = {own["target_modules"][0]: rng.randint(1, 6)}
        given = {name: value(rng) if callable(value) else value for name, value in fields.items()}
        return getattr(peft, kind)(**own, **given)

    return make


def oft(family: str, rng: Rng) -> Any:
    """Draw a config of any form; peft computes convolutions otherwise, unless their kernel has a single point."""
    modules = rng.choice([["fc"], ["point"], ["fc", "point"]]) if family == "convs" else some(family, rng)
    size: dict[str, int] = {"oft_block_size": rng.choice([4, 7, 8, 16])}
    if rng.random() < 0.5:
        size = {"r": rng.choice([3, 4, 6]), "oft_block_size": 0}
    form = rng.choice([{}, {"use_cayley_neumann": False}, {"num_cayley_neumann_terms": rng.randint(2, 8)}])
    bound = {"coft": True, "eps": 0.5} if rng.random() < 0.3 else {}
    return peft.OFTConfig(**size, **form, **bound, block_share=rng.random() < 0.3, target_modules=modules)


def boft(family: str, rng: Rng) -> Any:
    """Draw a config with one factor, since peft needs a CUDA extension for more."""
    modules = rng.choice([["stem"], ["point"], ["fc", "point"]]) if family == "convs" else some(family, rng)
    size = {"boft_block_size": 9 if modules == ["stem"] else rng.choice([2, 4, 8])}
    if rng.random() < 0.5 and modules != ["stem"]:
        size = {"boft_block_num": rng.choice([2, 4]), "boft_block_size": 0}
    return peft.BOFTConfig(**size, target_modules=modules)


def miss(family: str, rng: Rng) -> Any:
    """Draw a config of one of the variants; `bat` needs a rank that divides both sides of every weight."""
    word = rng.choice([True, False, "bat", "mini"])
    own = {"r": 8 if word == "bat" else rng.randint(1, 12), "mini_r": rng.choice([1, 2, 4]), "miss_dropout": 0.1}
    modules = ["fc"] if family == "convs" else some(family, rng)
    return peft.MissConfig(**own, init_weights=word, target_modules=modules)


def shira(family: str, rng: Rng) -> Any:
    own = {"r": rng.randint(1, 6), "random_seed": rng.choice([None, 7])}
    return peft.ShiraConfig(**own, target_modules=["fc"] if family == "convs" else some(family, rng))


def lily(family: str, rng: Rng) -> Any:
    own = {"r": rng.randint(1, 8), "stride_A": rng.randint(1, 3), "num_B": rng.randint(2, 5), "scaling": rng.random()}
    return peft_config("LilyConfig", **own, target_modules=["fc"] if family == "convs" else some(family, rng))


def c3a(family: str, rng: Rng) -> Any:
    modules = ["fc"] if family == "convs" else some(family, rng)
    more = {"block_size_pattern": {modules[0]: rng.choice([1, 2, 4])}} if rng.random() < 0.4 else {}
    starts = rng.choice([True, "xavier_uniform", "kaiming_uniform"])
    return peft.C3AConfig(block_size=rng.choice([2, 4, 8]), target_modules=modules, init_weights=starts, **more)


def gralora(family: str, rng: Rng) -> Any:
    k = rng.choice([1, 2, 4])
    own = {"gralora_k": k, "r": k * rng.randint(1, 2), "hybrid_r": rng.choice([0, 3]), "alpha": rng.choice([3, 8])}
    modules = ["fc"] if family == "convs" else some(family, rng)
    return peft_config("GraloraConfig", **own, target_modules=modules, **_turned(family))


def hira(family: str, rng: Rng) -> Any:
    modules = some(family, rng)
    if family in ("bert", "llama", "gpt_neox", "roberta") and rng.random() < 0.3:
        modules = [TABLES[family], modules[0]]
    own = {"r": rng.randint(1, 6), "hira_dropout": rng.choice([0.0, 0.1]), "target_modules": modules}
    return peft_config("HiraConfig", **own, init_weights=rng.choice([True, "gaussian"]), **_turned(family))


@dataclass(frozen=True)
class Kind:
    """One kind of configuration.

    Attributes:
        method: the family of methods it belongs to.
        make: a function that draws a config of this kind for a family of models.
        families: the families of models it is tried on.
        share: the number of its cases relative to other kinds.
        back: whether peft can express the result again; if not, only the import is checked.
        gradients: whether peft's gradients are those of its outputs.
    """

    method: str
    make: Callable[[str, Rng], Any]
    families: tuple[str, ...]
    share: int = 1
    back: bool = True
    gradients: bool = True


def _lora(**fields: Any) -> Callable[[str, Rng], Any]:
    return lambda family, rng: lora(
        family, rng, **{name: value(family, rng) if callable(value) else value for name, value in fields.items()}
    )


KINDS: Mapping[str, Kind] = {
    "lora": Kind("LoRA", lora, EVERY, 2),
    "rslora": Kind("rsLoRA", _lora(use_rslora=True), FIVE + PAIRS),
    "patterns": Kind("LoRA", patterns, tuple(LAYERED)),
    "layers": Kind("LoRA", layers, ("bert", "gpt_neox", "llama", "tied", "mixtral")),
    "expression": Kind("LoRA", expression, TEXT),
    "excluded": Kind("LoRA", excluded, ("bert", "gpt2", "llama", "vit", "bart")),
    "starts": Kind("LoRA", starts, FIVE),
    "saved": Kind("LoRA", _lora(modules_to_save=lambda f, _: [HEADS[f]]), ("bert", "roberta", "vit", "llama", "convs")),
    "saved-norms": Kind("LoRA", _lora(modules_to_save=lambda f, _: NORMS[f][:1]), ("llama", "bart", "mixtral")),
    "all-linear": Kind(
        "LoRA",
        _lora(target_modules="all-linear"),
        ("llama", "tied", "mixtral", "qwen3_moe", "bert", "gpt2", "t5", "vit"),
    ),
    "tables": Kind(
        "LoRA", _lora(target_modules=lambda f, _: [TABLES[f], LINEAR[f][0]]), ("bert", "llama", "gpt_neox", "roberta")
    ),
    "tied-target": Kind("tied", tied_target, ("tied", "gpt2")),
    "tied-saved": Kind("tied", tied_saved, ("tied", "gpt2"), 2),
    "tokens": Kind("trainable tokens", tokens, ("bert", "gpt2", "llama", "tied", "mixtral", "t5", "bart"), 2),
    "rows": Kind(
        "trainable tokens",
        lambda f, r: peft.TrainableTokensConfig(token_indices=r.sample(range(101), 25), target_modules=[TABLES[f]]),
        ("gpt2", "mixtral", "tied", "bert", "t5", "bart", "llama"),
    ),
    "experts": Kind("experts", experts, EXPERTS, 4),
    "parameters": Kind("experts", parameters, ("mixtral", "qwen3_moe", "llama4"), 3),
    "bias": Kind("bias", bias, ("bert", "roberta", "vit", "gpt2", "gpt_neox", "bart", "convs")),
    "convolutions": Kind("LoRA", convolutions, ("convs",), 6),
    "patches": Kind("LoRA", _lora(target_modules=["projection", "fc1"]), ("vit",)),
    "attention": Kind(
        "LoRA", _lora(target_modules=lambda _, r: r.choice([["attention"], ["attention", "fc"]])), ("convs",), 4
    ),
    "dora": Kind("DoRA", _lora(use_dora=True), (*FIVE, "t5", "bart", "mixtral"), 2),
    "dora-convs": Kind(
        "DoRA",
        _lora(use_dora=True, target_modules=lambda _, r: r.sample(["stem", "point", "fc", "line"], 2)),
        ("convs",),
        2,
    ),
    "pissa": Kind("PiSSA", _lora(init_lora_weights="pissa", r=lambda _, r: r.randint(1, 6)), (*FIVE, "t5", "mixtral")),
    "olora": Kind(
        "OLoRA",
        _lora(init_lora_weights="olora", r=lambda _, r: r.randint(1, 6)),
        ("bert", "gpt_neox", "llama", "vit", "t5", "mixtral", "bart"),
    ),
    "adalora": Kind("AdaLoRA", adalora, ("bert", "gpt2", "llama", "gpt_neox", "t5", "vit", "bart"), 2),
    "ia3": Kind("IA3", ia3, EVERY, 1),
    "ia3-convs": Kind("IA3", ia3, ("convs",), 3),
    "loha": Kind("LoHa", product("LoHaConfig"), ("bert", "llama", "gpt_neox", "t5", "vit", "bart", "convs"), 2),
    "lokr": Kind(
        "LoKr",
        product("LoKrConfig", decompose_both=lambda r: r.random() < 0.5, decompose_factor=lambda r: r.choice([-1, 4])),
        ("bert", "llama", "gpt_neox", "t5", "vit", "bart", "convs"),
        2,
    ),
    "oft": Kind("OFT", oft, ("bert", "llama", "gpt_neox", "t5", "vit", "bart", "convs"), 3),
    "boft": Kind("BOFT", boft, ("bert", "llama", "gpt_neox", "t5", "vit", "bart", "convs")),
    "miss": Kind("MiSS", miss, ("bert", "llama", "gpt_neox", "t5", "vit", "bart", "convs"), 2),
    "shira": Kind("SHiRA", shira, ("bert", "llama", "gpt_neox", "t5", "vit", "bart", "convs"), 2),
    "lily": Kind("Lily", lily, ("bert", "llama", "gpt_neox", "t5", "vit", "bart", "convs"), 2),
    "c3a": Kind(
        "C3A",
        c3a,
        ("bert", "roberta", "llama", "gpt_neox", "t5", "vit", "bart", "mixtral", "convs"),
        2,
        gradients=False,
    ),
    "gralora": Kind("GraLoRA", gralora, (*FIVE, "roberta", "t5", "bart", "mixtral", "convs"), 2),
    "hira": Kind("HiRA", hira, (*FIVE, "roberta", "t5", "bart", "mixtral", "convs"), 2),
    "vera": Kind("VeRA", vera, ("bert", "gpt2", "llama", "gpt_neox", "t5", "vit", "convs"), 2),
    "norms": Kind("LN-tuning", lambda f, r: peft.LNTuningConfig(target_modules=NORMS[f]), tuple(NORMS)),
    "prompt": Kind("prompt", virtual("PromptTuningConfig"), (*DECODERS, *PAIRS), 2),
    "p-tuning": Kind(
        "p-tuning",
        virtual(
            "PromptEncoderConfig",
            encoder_hidden_size=16,
            encoder_reparameterization_type=lambda r: r.choice(["MLP", "LSTM"]),
        ),
        (*DECODERS, *PAIRS),
    ),
    "prefix": Kind("prefix", virtual("PrefixTuningConfig"), DECODERS, 2),
    "prefix-projected": Kind(
        "prefix", virtual("PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=12), DECODERS
    ),
    "prefix-pair": Kind("prefix", virtual("PrefixTuningConfig"), PAIRS, 2, back=False),
    "wide": Kind("LoRA", _lora(r=64), ("llama", "bert")),
}
"""By name."""

COUNT = 400


@dataclass(frozen=True)
class Case:
    """A configuration of one kind for a family of models, with a seed."""

    kind: str
    family: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.family}-{self.seed}"

    def config(self) -> Any:
        """Return peft's config."""
        return KINDS[self.kind].make(self.family, random.Random(f"{self}"))


def cases(count: int = COUNT) -> list[Case]:
    """Return cases of every kind and family in turn, with further seeds until there are enough."""
    drawn: dict[Case, None] = {}
    for seed in range(count):
        for name, kind in KINDS.items():
            for family in kind.families:
                for number in range(kind.share):
                    drawn.setdefault(Case(name, family, seed * kind.share + number))
        if len(drawn) >= count:
            break
    every = list(drawn)
    random.Random(0).shuffle(every)
    first = {(case.kind, case.family): case for case in reversed(every)}
    kept = dict.fromkeys(first.values())
    kept.update(dict.fromkeys(every))
    return list(kept)[:count]
