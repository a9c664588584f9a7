"""Descriptions of models, drawn from a seed: plain data that can be stored, compared and reduced.

A model is a row of layers around a stream of one width. A layer is a list of blocks, each with a norm and a residual;
it occurs in several copies with weights of their own, and each copy may run several times. `models` builds the modules.
Whatever is drawn here builds and runs: sizes that have to divide each other do.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

WIDTHS = (6, 8, 12, 18)
ACTIVATIONS = ("relu", "gelu", "silu", "tanh")
NORMS = ("layer", "rms", "none")
INPUTS = ("tokens", "features", "image")
LIBRARY_SHARE = 0.2
"""Share of the models that are classes of transformers instead."""

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """A part of a layer that reads the stream and adds to it.

    Attributes:
        kind: a key of `KINDS`.
        options: the sizes and choices of its kind.
    """

    kind: str
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """A layer of blocks.

    Attributes:
        blocks: what it computes, one after the other, each kind at most once.
        copies: how many such layers follow one another, with weights of their own.
        runs: how often each of them is run before the next.
        norm: the norm in front of every block.
        scale: the factor of what a block adds.
        tied: whether all copies share the first weight of their first block.
    """

    blocks: tuple[Block, ...]
    copies: int = 1
    runs: int = 1
    norm: str = "layer"
    scale: float = 1.0
    tied: bool = False


@dataclass(frozen=True)
class Model:
    """A model; `models.build` makes the module.

    Attributes:
        seed: the seed of its weights.
        input: ``tokens`` (ids of a table), ``features`` (vectors that a map takes to the stream's width) or ``image``
            (patches by a convolution).
        width: the width of the stream.
        vocabulary: rows of the table, width of features, or channels of an image.
        outputs: the number of scores; 0 for a head that is tied to the table of tokens.
        layers: the layers.
        masked: whether the model takes a second input, a factor for every position.
        pooled: whether it returns a mapping with a second output, from the mean over positions.
        positions: whether the stream starts with a table of positions, of this many rows; 0 for none.
        family: a family of transformers' classes instead of all of the above.
        config: changes of the family's config.
    """

    seed: int
    input: str = "tokens"
    width: int = 8
    vocabulary: int = 11
    outputs: int = 5
    layers: tuple[Layer, ...] = ()
    masked: bool = False
    pooled: bool = False
    positions: int = 0
    family: str | None = None
    config: Options = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the description as plain data."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Model:
        """Return the description that `to_json` has written."""
        layers = tuple(
            Layer(**{**layer, "blocks": tuple(Block(**block) for block in layer["blocks"])}) for layer in data["layers"]
        )
        return cls(**{**data, "layers": layers})


def draw_model(seed: int) -> Model:
    """Return the model of a seed."""
    draw = random.Random(f"model {seed}")
    if draw.random() < LIBRARY_SHARE:
        return _library(draw, seed)
    width = draw.choice(WIDTHS)
    kind = draw.choices(INPUTS, (6, 3, 2))[0]
    return Model(
        seed=seed,
        input=kind,
        width=width,
        vocabulary=draw.choice((3, 5)) if kind == "image" else draw.choice((11, 17, 23)),
        outputs=0 if kind == "tokens" and draw.random() < 0.4 else draw.choice((3, 5, 14)),
        layers=tuple(_layer(draw, width) for _ in range(draw.choice((1, 1, 2, 3)))),
        masked=draw.random() < 0.2,
        pooled=draw.random() < 0.25,
        positions=24 if draw.random() < 0.2 else 0,
    )


def _layer(draw: random.Random, width: int) -> Layer:
    kinds = draw.sample(sorted(KINDS), draw.choice((1, 1, 2, 2, 3)))
    if draw.random() < 0.3:
        kinds = ["attention", draw.choice(("mlp", "gated", "fused_gated", "experts"))]
    copies = draw.choice((1, 1, 1, 2, 2, 4))
    return Layer(
        blocks=tuple(Block(kind, KINDS[kind](draw, width)) for kind in kinds),
        copies=copies,
        runs=draw.choice((1, 1, 1, 1, 2)),
        norm=draw.choice(NORMS),
        scale=draw.choice((1.0, 1.0, 0.5)),
        tied=copies > 1 and draw.random() < 0.3,
    )


def _inner(draw: random.Random, width: int) -> int:
    """Return an inner width other than the stream's, with divisors in common with it."""
    return draw.choice([size for size in (4, 10, 12, 16, 20) if size != width])


def _mlp(draw: random.Random, width: int) -> Options:
    bias = draw.random() < 0.7
    return {"inner": _inner(draw, width), "activation": draw.choice(ACTIVATIONS), "bias": bias}


def _fused_gated(draw: random.Random, width: int) -> Options:
    return {**_mlp(draw, width), "interleaved": draw.random() < 0.5}


def _attention(draw: random.Random, width: int) -> Options:
    heads = draw.choice([n for n in (1, 2, 3) if width % n == 0])
    form = draw.choice(("separate", "separate", "contiguous", "interleaved", "shared", "in_proj"))
    fused = form in ("interleaved", "shared", "in_proj")
    return {
        "form": form,
        "heads": heads,
        "groups": heads if fused else draw.choice([n for n in (1, heads) if heads % n == 0]),
        "causal": draw.random() < 0.5,
        "by_hand": draw.random() < 0.3,
        "bias": draw.random() < 0.6,
    }


def _convolution(draw: random.Random, width: int) -> Options:
    groups = draw.choice([n for n in (1, 1, 2) if width % n == 0])
    return {"inner": draw.choice((4, 10)), "kernel": draw.choice((1, 3)), "groups": groups, "bias": draw.random() < 0.7}


def _recurrent(draw: random.Random, width: int) -> Options:
    form = draw.choice(("elman", "gated", "over_time"))
    return {"inner": draw.choice((4, 10)), "form": form, "steps": draw.choice((2, 3))}


def _experts(draw: random.Random, width: int) -> Options:
    experts = draw.choice((2, 3, 4))
    return {
        "experts": experts,
        "chosen": draw.randint(1, min(2, experts - 1)),
        "inner": _inner(draw, width),
        "form": draw.choice(("list", "batched", "turned")),
        "activation": draw.choice(ACTIVATIONS),
    }


KINDS: Mapping[str, Any] = {
    "mlp": _mlp,
    "gated": _mlp,
    "fused_gated": _fused_gated,
    "sliced": _mlp,
    "columns": _mlp,
    "attention": _attention,
    "convolution": _convolution,
    "image_convolution": lambda draw, width: {"channels": draw.choice((2, 3)), "bias": draw.random() < 0.7},
    "recurrent": _recurrent,
    "experts": _experts,
    "twice": lambda draw, width: {"activation": draw.choice(ACTIVATIONS), "bias": draw.random() < 0.7},
    "turned": _mlp,
}
"""For every kind of block, the function that draws its options from a generator and the stream's width."""

FAMILIES = ("bert", "roberta", "gpt2", "gpt_neox", "llama", "mixtral", "t5", "vit")
_NAMES = {
    "gpt2": {"hidden_size": "n_embd", "num_attention_heads": "n_head", "intermediate_size": "n_inner"},
    "t5": {"hidden_size": "d_model", "num_attention_heads": "num_heads", "intermediate_size": "d_ff"},
}

_DROPOUTS = {
    **dict.fromkeys(("bert", "roberta", "vit"), ("hidden_dropout_prob", "attention_probs_dropout_prob")),
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "t5": ("dropout_rate",),
}


def _library(draw: random.Random, seed: int) -> Model:
    family = draw.choice(FAMILIES)
    heads = draw.choice((2, 4))
    config: dict[str, Any] = {
        "hidden_size": heads * draw.choice((4, 6)),
        "num_attention_heads": heads,
        "intermediate_size": draw.choice((20, 28)),
    }
    config = {_NAMES.get(family, {}).get(name, name): value for name, value in config.items()}
    if family in ("llama", "mixtral"):
        config["num_key_value_heads"] = draw.choice((1, 2))
    if family == "t5":
        config["d_kv"] = draw.choice((4, 6))
        config["feed_forward_proj"] = draw.choice(("relu", "gated-gelu"))
    if family == "mixtral":
        config |= {"num_local_experts": draw.choice((2, 4)), "experts_implementation": "batched_mm"}
    if family == "llama":
        config |= {"tie_word_embeddings": draw.random() < 0.4, "attention_bias": draw.random() < 0.3}
    if family == "gpt_neox":
        config["use_parallel_residual"] = draw.random() < 0.6
    if family in ("bert", "roberta"):
        config["hidden_act"] = draw.choice(("gelu", "relu"))
    config |= dict.fromkeys(_DROPOUTS.get(family, ()), 0.0)  # what is drawn at random cannot be compared
    return Model(seed=seed, family=family, config=config | {"layers": draw.choice((1, 2, 4))})
