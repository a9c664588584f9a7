"""Checkpoints that the installed peft writes: randomised configs of every type, on every family."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing.compare import inputs_for, largest_difference, outputs_of
from graftc.testing.families import tiny
from tests.kit.releases import peft_config
from tests.runtime.interop.adapters import with_noise

TOLERANCE = 1e-5
Fields = dict[str, Any]
Rng = random.Random

LINEAR: dict[str, list[str]] = {
    "bert": ["query", "key", "value", "output.dense", "intermediate.dense"],
    "roberta": ["query", "key", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_h_to_4h", "dense_4h_to_h"],
    "llama": ["q_proj", "k_proj", "v_proj", "gate_proj", "down_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "t5": ["q", "k", "v", "wi", "wo"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}
NORMS = {
    **{"bert": ["LayerNorm"], "roberta": ["LayerNorm"], "gpt2": ["ln_1", "ln_f"], "t5": ["layer_norm"]},
    **{"gpt_neox": ["input_layernorm"], "llama": ["norm", "input_layernorm"], "vit": ["layernorm_before", "layernorm"]},
    "mixtral": ["norm", "post_attention_layernorm"],
}
TABLES = {
    **{"bert": "word_embeddings", "roberta": "word_embeddings", "gpt2": "wte", "gpt_neox": "embed_in"},
    **{"llama": "embed_tokens", "mixtral": "embed_tokens"},
}
HEADS = {"bert": "classifier", "roberta": "classifier", "vit": "classifier", "llama": "lm_head", "mixtral": "lm_head"}
LAYERED = {"bert": "layer", "roberta": "layer", "gpt2": "h", "gpt_neox": "layers", "llama": "layers", "vit": "layers"}
DECODERS = ("gpt2", "gpt_neox", "llama")
NO_CONV1D = ("bert", "roberta", "gpt_neox", "llama", "mixtral", "t5", "vit")


@dataclass(frozen=True)
class Checkpoint:
    """A peft config on a family.

    Attributes:
        name: the name of the kind.
        family: a key of `graftc.testing.families.FAMILIES`.
        seed: the seed of the random values.
    """

    name: str
    family: str
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.name}-{self.family}"

    def config(self) -> Any:
        """Return peft's config."""
        return KINDS[self.name][0](self.family, random.Random(f"{self}-{self.seed}"))


def some(family: str, rng: Rng) -> list[str]:
    return sorted(rng.sample(LINEAR[family], rng.randint(1, 3)))


def lora(family: str, rng: Rng, **fields: Any) -> Any:
    own = {"r": rng.randint(1, 9), "lora_alpha": rng.choice([1, 8, 16, 7]), "target_modules": some(family, rng)}
    return peft.LoraConfig(**{**own, "fan_in_fan_out": family == "gpt2", **fields})


def patterns(family: str, rng: Rng) -> Any:
    modules = some(family, rng)
    # Overlapping keys mean something else once they are saved, because peft sorts them.
    key = rf"{LAYERED[family]}\.1\..*{modules[0]}" if family in LAYERED else modules[0]
    ranks, alphas = {key: rng.randint(1, 4)}, {modules[-1]: rng.randint(2, 30)}
    return lora(family, rng, target_modules=modules, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)


def layers(family: str, rng: Rng) -> Any:
    return lora(family, rng, layers_to_transform=[rng.randint(0, 1)], layers_pattern=LAYERED[family])


def experts(family: str, rng: Rng) -> Any:
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    named = rng.sample(both, 2) if rng.random() < 0.5 else [rng.choice(both)]
    return lora(family, rng, target_parameters=named, target_modules=["q_proj"])


def tokens(family: str, rng: Rng) -> Any:
    return lora(family, rng, trainable_token_indices=rng.sample(range(90), 4))


def virtual(kind: str, task: str = "CAUSAL_LM", **fields: Any) -> Callable[[str, Rng], Any]:
    return lambda family, rng: getattr(peft, kind)(task_type=task, num_virtual_tokens=rng.randint(1, 6), **fields)


def ia3(family: str, rng: Rng) -> Any:
    modules = some(family, rng)
    inner = [modules[-1]] if rng.random() < 0.7 else []
    return peft.IA3Config(target_modules=modules, feedforward_modules=inner, fan_in_fan_out=family == "gpt2")


def adalora(family: str, rng: Rng) -> Any:
    own = {"init_r": rng.randint(3, 8), "target_r": 2, "lora_alpha": rng.choice([4, 9]), "total_step": 20}
    return peft.AdaLoraConfig(**own, target_modules=some(family, rng), fan_in_fan_out=family == "gpt2")


def vera(family: str, rng: Rng) -> Any:
    own = {"r": rng.choice([3, 64]), "projection_prng_key": rng.randint(0, 99), "save_projection": rng.random() < 0.5}
    return peft.VeraConfig(**own, target_modules=some(family, rng), fan_in_fan_out=family == "gpt2")


def product(kind: str, **fields: Any) -> Callable[[str, Rng], Any]:
    def make(family: str, rng: Rng) -> Any:
        own = {"r": rng.randint(1, 6), "alpha": rng.choice([3, 8]), "target_modules": some(family, rng), **fields}
        return getattr(peft, kind)(**own)

    return make


def lokr(family: str, rng: Rng) -> Any:
    fields = {"decompose_both": rng.random() < 0.5, "decompose_factor": rng.choice([-1, 4])}
    return product("LoKrConfig", **fields)(family, rng)


def oft(family: str, rng: Rng) -> Any:
    size = rng.choice([{"oft_block_size": rng.choice([7, 8])}, {"r": 4, "oft_block_size": 0}])
    form = {"use_cayley_neumann": rng.random() < 0.5, "block_share": rng.random() < 0.5}
    return peft.OFTConfig(**size, **form, target_modules=some(family, rng))


def miss(family: str, rng: Rng) -> Any:
    word = rng.choice([True, "bat", "mini"])
    return peft.MissConfig(r=8, mini_r=4, init_weights=word, target_modules=some(family, rng))


def c3a(family: str, rng: Rng) -> Any:
    modules = some(family, rng)
    return peft.C3AConfig(block_size=4, target_modules=modules, block_size_pattern={modules[0]: rng.choice([2, 8])})


def gralora(family: str, rng: Rng) -> Any:
    k = rng.choice([2, 4])
    own = {"gralora_k": k, "r": k * rng.randint(1, 2), "hybrid_r": rng.choice([0, 3]), "alpha": rng.choice([3, 8])}
    return peft_config("GraloraConfig", **own, target_modules=some(family, rng), fan_in_fan_out=family == "gpt2")


def hira(family: str, rng: Rng) -> Any:
    modules = [TABLES[family], LINEAR[family][0]] if family == "bert" else some(family, rng)
    modules = ["projection", "fc2"] if family == "vit" else modules
    return peft_config("HiraConfig", r=rng.randint(1, 6), target_modules=modules, fan_in_fan_out=family == "gpt2")


KINDS: dict[str, tuple[Callable[[str, Rng], Any], tuple[str, ...]]] = {
    "lora": (lora, tuple(LINEAR)),
    "patterns": (patterns, ("bert", "gpt2", "llama", "t5", "vit")),
    "layers": (layers, ("bert", "gpt_neox", "llama")),
    "bias": (lambda f, r: lora(f, r, bias="lora_only"), ("bert", "vit")),
    "every-bias": (lambda f, r: lora(f, r, bias="all"), ("roberta", "gpt2")),
    "head": (lambda f, r: lora(f, r, modules_to_save=[HEADS[f]]), ("bert", "roberta", "vit", "mixtral")),
    "norm-suffix": (lambda f, r: lora(f, r, modules_to_save=["norm"]), ("llama",)),
    "tables": (
        lambda f, r: lora(f, r, target_modules=[TABLES[f], LINEAR[f][0]]),
        ("bert", "gpt2", "gpt_neox"),
    ),
    "lm-head": (lambda f, r: lora(f, r, target_modules=["lm_head", LINEAR[f][0]]), ("gpt2", "llama")),
    "conv": (lambda f, r: lora(f, r, target_modules=["projection"]), ("vit",)),
    "experts": (experts, ("mixtral",)),
    "dora": (lambda f, r: lora(f, r, use_dora=True), ("bert", "gpt2", "llama", "t5")),
    "dora-conv": (lambda f, r: lora(f, r, use_dora=True, target_modules=["projection", "fc2"]), ("vit",)),
    "alora": (
        lambda f, r: lora(f, r, task_type="CAUSAL_LM", alora_invocation_tokens=[64, 61], use_rslora=f == "llama"),
        ("llama", "gpt2"),
    ),
    "pissa": (lambda f, r: lora(f, r, init_lora_weights="pissa"), ("bert", "gpt2")),
    "olora": (lambda f, r: lora(f, r, init_lora_weights="olora"), ("vit",)),
    "tokens": (tokens, ("llama", "gpt2")),
    "rows": (
        lambda f, r: peft.TrainableTokensConfig(token_indices=r.sample(range(90), 3), target_modules=[TABLES[f]]),
        ("gpt2", "mixtral"),
    ),
    "prompt": (virtual("PromptTuningConfig"), ("llama", "gpt2")),
    "prompt-pair": (virtual("PromptTuningConfig", "SEQ_2_SEQ_LM"), ("t5",)),
    "p-tuning": (virtual("PromptEncoderConfig", encoder_hidden_size=16), ("gpt_neox",)),
    "prefix": (virtual("PrefixTuningConfig"), ("llama", "gpt2", "gpt_neox")),
    "prefix-pair": (virtual("PrefixTuningConfig", "SEQ_2_SEQ_LM"), ("t5",)),
    "ia3": (ia3, ("bert", "gpt2", "llama", "t5")),
    "adalora": (adalora, ("gpt2", "llama")),
    "vera": (vera, ("roberta", "llama", "gpt2")),
    "loha": (product("LoHaConfig"), ("bert", "vit")),
    "lokr": (lokr, ("gpt_neox", "t5")),
    "oft": (oft, ("roberta", "llama")),
    "boft": (
        lambda f, r: peft.BOFTConfig(boft_block_size=r.choice([2, 4, 8]), target_modules=some(f, r)),
        ("bert", "vit"),
    ),
    "boft-conv": (lambda f, r: peft.BOFTConfig(boft_block_size=8, target_modules=["projection"]), ("vit",)),
    "miss": (miss, ("bert", "llama", "gpt_neox")),
    "shira": (lambda f, r: peft.ShiraConfig(r=r.randint(1, 6), target_modules=some(f, r)), ("bert", "llama", "t5")),
    "lily": (
        lambda f, r: peft_config("LilyConfig", r=r.randint(1, 6), stride_A=2, num_B=3, target_modules=some(f, r)),
        ("bert", "llama", "t5"),
    ),
    "c3a": (c3a, ("roberta", "llama", "mixtral")),
    "gralora": (gralora, ("bert", "gpt2", "gpt_neox", "t5")),
    "hira": (hira, ("bert", "gpt2", "vit", "llama")),
    "norms": (lambda f, r: peft.LNTuningConfig(target_modules=NORMS[f]), ("bert", "llama")),
}
"""By kind: what makes its config, and the families it is tried on."""

EVERY = [Checkpoint(name, family) for name, (_, families) in KINDS.items() for family in families]
ONE_WAY = ("prefix-pair",)
"""Kinds that peft reads in a way that nothing else can be written for: see ``docs/peft.md``."""


@cache
def base(family: str) -> nn.Module:
    """Return a tiny model, which is shared and must not be written to."""
    return tiny(family)


def peft_model(config: Any, family: str, noise: float = 0.1, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return peft's model with every trained tensor perturbed, in eval mode."""
    return with_noise(copy.deepcopy(base(family)).to(dtype), config, noise, seed)


def saved(config: Any, family: str, folder: Path, **more: Any) -> Any:
    """Save peft's model to a folder and return it."""
    model = peft_model(config, family, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model


def loaded(folder: Path, family: str) -> Any:
    """Return the model that peft loads; the file must contain exactly the tensors that it trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        model = peft.get_peft_model(copy.deepcopy(base(family)), config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        result = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
    # peft copies a prompt into its table first, and then reports any prompt's key as unexpected, even its own.
    assert set(result.unexpected_keys) <= ({"prompt_embeddings"} if config.is_prompt_learning else set())
    trained -= {name for name in trained if config.is_prompt_learning and name.startswith("prompt_encoder.")}
    assert not trained & set(result.missing_keys)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base(family)), folder)
    said = [str(warning.message) for warning in caught if "peft" in str(warning.filename)]
    assert not [text for text in said if "missing" in text.lower() or "unexpected" in text.lower()], said
    return again.eval()


def difference(ours: Compiled, theirs: Any, *, seed: int = 0) -> float:
    """Return the largest difference of the first outputs of real tokens; peft's begin with those of virtual tokens."""
    inputs = inputs_for(ours, (3, 9), seed)
    if getattr(theirs, "active_peft_config", None) is not None and theirs.active_peft_config.is_prompt_learning:
        inputs |= {name: torch.ones_like(value) for name, value in inputs.items() if name.endswith("attention_mask")}
    output, expected = first(ours, inputs), first(theirs, inputs)
    return largest_difference([output], [expected[:, -output.shape[1] :] if output.dim() == 3 else expected])


def first(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the first output, the logits."""
    return outputs_of(model, inputs)[0]


def effect(ours: Compiled, family: str) -> float:
    """Return how much the adapter changes the outputs."""
    inputs = inputs_for(ours, (3, 9))
    return largest_difference([first(ours, inputs)], [first(base(family), inputs)])


def check(case: Checkpoint, folder: Path) -> tuple[float, float | None]:
    """Import a checkpoint and export it again, both judged by peft.

    Returns:
        The largest differences of outputs: of the import, and of the export as peft loads it.
    """
    theirs = saved(case.config(), case.family, folder / "theirs", seed=case.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = graftc.import_peft(folder / "theirs", base(case.family))
    assert effect(ours, case.family) > 1e-3, "the adapter changes nothing"
    imported = difference(ours, theirs)
    assert imported <= TOLERANCE
    if case.name in ONE_WAY:
        return imported, None
    ours.export(folder / "ours", format="peft")
    back = difference(ours, loaded(folder / "ours", case.family))
    assert back <= TOLERANCE
    return imported, back


IN_SIXTEEN_BITS = (
    *("lora", "patterns", "bias", "head", "tables", "conv", "experts"),
    *("dora", "ia3", "loha", "lokr", "hira", "gralora", "oft", "boft"),
    *("dora", "ia3", "loha", "lokr", "c3a", "hira", "gralora"),
)
"""Kinds that are tried on a base in bfloat16 as well."""


def check_in_sixteen_bits(case: Checkpoint, folder: Path, inputs: int = 60) -> tuple[float, float]:
    """Import a checkpoint of a base in bfloat16.

    The same tensors in float32 give peft's outputs within `TOLERANCE`, so every site has the same update.

    Returns:
        The root mean square errors of outputs in bfloat16, relative to peft's in float32 with the same tensors: of
        graftc, and of peft.
    """
    theirs = saved(case.config(), case.family, folder, noise=0.02, dtype=torch.bfloat16)
    exact = copy.deepcopy(theirs).float()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = graftc.import_peft(folder, copy.deepcopy(base(case.family)).bfloat16())
        wide = graftc.import_peft(folder, copy.deepcopy(base(case.family)).bfloat16().float())
    assert difference(wide, exact) <= TOLERANCE
    errors: list[list[Tensor]] = [[], []]
    for seed in range(inputs):
        given = inputs_for(wide, (3, 9), seed)
        narrow = {name: v.bfloat16() if v.is_floating_point() else v for name, v in given.items()}
        expected = first(exact, given)
        for model, squares in zip((ours, theirs), errors, strict=True):
            squares.append((first(model, narrow).float() - expected).square().mean())
    own, peer = (float(torch.stack(squares).mean().sqrt()) for squares in errors)
    return own, peer
