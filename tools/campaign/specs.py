"""Random specs that fit a model: methods of the whole registry, at places that exist, with sizes that divide."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from graftc.specs.claims import SiteKind
from graftc.specs.registry import method_specs
from tools.campaign.blocks import Part
from tools.campaign.grammar import Model

Spec = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A module that a target can name, and the sizes of its map, ``[rows, columns]``, 0 where they do not matter."""

    path: str
    kind: SiteKind
    rows: int = 0
    columns: int = 0
    kernel: bool = False


def places_of(built: nn.Module) -> list[Place]:
    """Return the places of a module that this campaign adapts by name, found by the classes of its children."""
    places = []
    for path, module in built.named_modules():
        if isinstance(module, nn.Linear):
            places.append(Place(path, SiteKind.LINEAR, module.out_features, module.in_features))
        elif isinstance(module, Conv1D):
            places.append(Place(path, SiteKind.LINEAR, module.weight.shape[1], module.weight.shape[0]))
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            places.append(Place(path, SiteKind.LINEAR, module.out_channels, module.weight[0].numel(), True))
        elif isinstance(module, nn.Embedding):
            places.append(Place(path, SiteKind.EMBEDDING, module.embedding_dim, module.num_embeddings))
        elif isinstance(module, Part) and module.stacked:
            side = math.gcd(*module.get_parameter("up").shape[1:])  # of both stacks, whose sides are exchanged
            places.append(Place(path, SiteKind.EXPERTS, side, side))
        elif type(module).__name__.endswith("Norm") and hasattr(module, "weight"):
            places.append(Place(path, SiteKind.NORM))
    return places


@dataclass(frozen=True)
class Sizes:
    """Sizes that suit all places of one adaptation.

    Attributes:
        least: the smallest side of all maps.
        columns: a number that divides every map's columns.
        sides: a number that divides every side.
        rows: the smallest number of rows.
    """

    least: int
    columns: int
    sides: int
    rows: int

    @classmethod
    def of(cls, places: Sequence[Place]) -> Sizes:
        """Return the sizes of some places."""
        maps = [p for p in places if p.rows] or [Place("", SiteKind.LINEAR, 4, 4)]
        every = [side for p in maps for side in (p.rows, p.columns)]
        return cls(min(every), math.gcd(*(p.columns for p in maps)), math.gcd(*every), min(p.rows for p in maps))


Drawn = Callable[[random.Random, Sizes], Mapping[str, Any] | None]


def _divisors(number: int) -> list[int]:
    return [n for n in range(2, number + 1) if number % n == 0]


def _rank(draw: random.Random, sizes: Sizes) -> int:
    return draw.randint(1, min(4, sizes.least))


def _low_rank(*more: tuple[str, Sequence[Any]]) -> Drawn:
    """Return a function that draws a rank, a scaling, and other fields among values."""

    def drawn(draw: random.Random, sizes: Sizes) -> Mapping[str, Any]:
        options = {"rank": _rank(draw, sizes), "alpha": draw.choice((1, 3, 8))}
        return options | {name: draw.choice(values) for name, values in more if draw.random() < 0.5}

    return drawn


def _blocks(field: str, among: Callable[[Sizes], int], *more: tuple[str, Sequence[Any]]) -> Drawn:
    """Return a function that draws a divisor of a size; no options if it has none."""

    def drawn(draw: random.Random, sizes: Sizes) -> Mapping[str, Any] | None:
        divisors = _divisors(among(sizes))
        if not divisors:
            return None
        options = {field: draw.choice(divisors)}
        return options | {name: draw.choice(values) for name, values in more if draw.random() < 0.5}

    return drawn


def _gralora(draw: random.Random, sizes: Sizes) -> Mapping[str, Any] | None:
    parts = [n for n in _divisors(sizes.sides) if n <= sizes.least]
    if not parts:
        return None
    k = draw.choice(parts)
    return {"k": k, "rank": k, "hybrid_rank": draw.choice((0, 1)), "alpha": draw.choice((2, 6))}


def _miss(draw: random.Random, sizes: Sizes) -> Mapping[str, Any] | None:
    variant, square = draw.choice(("balance", "mini", "bat")), _divisors(sizes.sides)
    if variant == "balance":
        return {"rank": _rank(draw, sizes)}
    if not square:
        return None
    extra = {"mini_rank": draw.choice(square)} if variant == "mini" else {}
    return {"variant": variant, "rank": draw.choice(square), **extra}


def _boft(draw: random.Random, sizes: Sizes) -> Mapping[str, Any] | None:
    usable = [n for n in _divisors(sizes.columns) if n % 2 == 0 and (sizes.columns // n) % 2 == 0]
    if usable and draw.choice((1, 2)) == 2:
        return {"block_size": draw.choice(usable), "factors": 2}
    return _blocks("block_size", lambda s: s.columns)(draw, sizes)


def _bottleneck(draw: random.Random, sizes: Sizes) -> Mapping[str, Any]:
    options = {"bottleneck": draw.choice((2, 3)), "activation": draw.choice(("relu", "gelu", "silu", "tanh"))}
    return options | ({"scale": draw.choice((0.5, "learned"))} if draw.random() < 0.3 else {})


def _density(**more: Any) -> Drawn:
    return lambda draw, sizes: {"density": draw.choice((0.1, 0.3)), **more}


def _prefix(draw: random.Random, sizes: Sizes) -> Mapping[str, Any]:
    options: dict[str, Any] = {"length": draw.choice((1, 3)), "dropout": 0.0}
    return options | ({"reparameterization": {"hidden": 5}} if draw.random() < 0.3 else {})


OPTIONS: Mapping[str, Drawn] = {
    "lora": _low_rank(
        ("rslora", (True,)), ("init", ("gaussian", "orthogonal", "pissa", "olora")), ("bias", ("lora_only", "all"))
    ),
    "dora": _low_rank(("direction", (False,)), ("norm_gradient", ("exact",))),
    "adalora": _low_rank(),
    "sora": _low_rank(),
    "dylora": _low_rank(),
    "adamix_lora": lambda draw, sizes: {
        "rank": _rank(draw, sizes), "experts": 3, "dropout": 0.0, "share": draw.choice(("up", "down", "none"))
    },
    "alora": lambda draw, sizes: {"rank": _rank(draw, sizes), "invocation": [3, 4]},
    "loha": _low_rank(),
    "lokr": _low_rank(("factor", (2, 3)), ("decompose_both", (True,))),
    "hira": lambda draw, sizes: {"rank": _rank(draw, sizes)},
    "vera": lambda draw, sizes: {"rank": draw.choice((2, 5))},
    "lily": lambda draw, sizes: {"rank": _rank(draw, sizes)},
    "oft": _blocks("block_size", lambda s: s.columns, ("cayley", ("exact",)), ("terms", (2, 3, 4, 6)),
                   ("block_share", (True,))),
    "boft": _boft,
    "c3a": _blocks("block_size", lambda s: s.sides),
    "gralora": _gralora,
    "miss": _miss,
    "ia3": lambda draw, sizes: {"side": draw.choice(("output", "input"))},
    "bitfit": lambda draw, sizes: {"add_missing": draw.random() < 0.5},
    "rows": lambda draw, sizes: {"rows": draw.sample(range(sizes.rows), min(2, sizes.rows))},
    "shira": lambda draw, sizes: {"rank": 1},
    "mask": _density(selection="random"),
    "spiel": _density(),
    "lt_sft": _density(),
    "diff_pruning": _density(),
    "pruning": lambda draw, sizes: {"variant": draw.choice(("magnitude", "movement")), "density": 0.5},
    "last_layers": lambda draw, sizes: {"count": 1},
    "adamix": lambda draw, sizes: {"bottleneck": 3, "experts": 2},
    "prefix": _prefix,
    "p_tuning_v2": _prefix,
    "prompt": lambda draw, sizes: {"length": draw.choice((1, 3)), "init": "normal"},
    "pre_embed": lambda draw, sizes: {"length": draw.choice((1, 3)), "init": "normal"},
    "pre_layer": lambda draw, sizes: {"length": draw.choice((1, 3))},
    "pasta": lambda draw, sizes: {"special_tokens": [1, 2], "dropout": 0.0},
    "mam": lambda draw, sizes: {
        "prefix": {"length": 2, "reparameterization": None}, "adapter": {"bottleneck": 3}
    },
    "unipelt": lambda draw, sizes: {
        "prefix": {"length": 2, "reparameterization": None}, "adapter": {"bottleneck": 3}, "lora": {"rank": 2}
    },
    **dict.fromkeys(("houlsby", "pfeiffer", "bapna_firat", "adapter_l", "he_parallel", "he_sequential"), _bottleneck),
    "bottleneck": _bottleneck,
    "llm_adapters": lambda draw, sizes: {
        "placement": draw.choice(("series", "input", "output", "parallel")), **_bottleneck(draw, sizes)
    },
}  # fmt: skip
"""The options of methods beside their target; a method without an entry has its defaults."""

BY_ROLE: Mapping[str, tuple[str, ...]] = {
    "bottleneck": ("attn.sublayer", "ffn.sublayer"),
    "loreft": ("layer.out",),
    "norms": ("norm",),
}
"""Roles for methods whose sites have no path of their own, and no default target."""


def draw_spec(seed: int, model: Model, built: nn.Module) -> Spec:
    """Return the spec of a seed for a model.

    Args:
        seed: the seed.
        model: the description of the model.
        built: its module, which is only looked at.
    """
    draw = random.Random(f"spec {seed}")
    places = places_of(built)
    attending = _attending(model)
    adapt: list[Spec] = []
    count = draw.choice((1, 1, 1, 2, 2, 3))
    for _ in range(30):
        if len(adapt) == count:
            break
        entry = _adaptation(draw, model, places, attending, named=f"a{len(adapt)}")
        if entry is not None and not (adapt and _stacks_badly(adapt, entry)):
            adapt.append(entry)
    spec: Spec = {"adapt": adapt}
    if draw.random() < 0.2:
        taken = {path for entry in adapt for path in entry.get("target", {}).get("modules", ())}
        free = [place.path for place in places if place.path not in taken]
        if free:
            spec["train"] = [draw.choice(free)]
    tied = [path for path in _tied(built) if any(path in e.get("target", {}).get("modules", ()) for e in adapt)]
    if tied and draw.random() < 0.6:
        spec["untie"] = tied
    return spec


def _tied(built: nn.Module) -> list[str]:
    """Return the paths of modules whose weights have another name as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in built.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return sorted(path for paths in names.values() if len(paths) > 1 for path in paths)


def _adaptation(
    draw: random.Random, model: Model, places: Sequence[Place], attending: Sequence[int] | None, named: str
) -> Spec | None:
    """Return a random adaptation; None if the method that was drawn has no place in the model."""
    tag = draw.choice(sorted(method_specs()))
    kinds = set(method_specs()[tag].claims.sites)
    if model.family in (None, "vit") and tag in _OF_TOKENS:
        return None
    if model.family not in _DECODERS and tag == "alora":
        return None
    if {SiteKind.SUBLAYER, SiteKind.ATTENTION, SiteKind.VALUE} & kinds:
        if not attending:
            return None
        roles: Spec = {"role": list(BY_ROLE[tag])} if tag in BY_ROLE else {}
        return _entry(draw, tag, named, roles, Sizes.of(()))
    usable = [place for place in places if place.kind in kinds and not (tag in _SPARSE and place.path == "head")]
    if tag == "llm_adapters":
        usable = [place for place in usable if not place.kernel]
    if tag == "cross_attention":
        return _entry(draw, tag, named, {}, Sizes.of(())) if model.family == "t5" else None
    if not usable:
        return None
    chosen = draw.sample(usable, min(len(usable), draw.choice((1, 1, 2, 3))))
    sizes, target = Sizes.of(chosen), dict[str, Any](modules=sorted(place.path for place in chosen))
    if attending and kinds & {SiteKind.LINEAR} and draw.random() < 0.35:
        target = {"role": sorted(draw.sample(("attn.q", "attn.k", "attn.v"), draw.choice((1, 2))))}
        sizes = Sizes(2, 2, 2, 2)
        if model.family is None:
            target["layers"] = list(attending)
    return _entry(draw, tag, named, {} if tag == "last_layers" else target, sizes)


def _entry(draw: random.Random, tag: str, named: str, target: Spec, sizes: Sizes) -> Spec | None:
    """Return an entry with random options, and the method's default target if none is given."""
    options = OPTIONS[tag](draw, sizes) if tag in OPTIONS else {}
    if options is None:
        return None
    return {"name": named, "method": tag, **({"target": target} if target else {}), **options}


_OF_TOKENS = frozenset({"prompt", "pre_embed", "pre_layer", "pasta"})
"""Methods for models that take embeddings in place of ids, which only those of transformers do."""

_DECODERS = frozenset({"gpt2", "gpt_neox", "llama", "mixtral"})

_SPARSE = frozenset({"mask", "diff_pruning", "child_tuning", "bitfit", "lt_sft"})
"""Methods that leave out heads."""


def _attending(model: Model) -> list[int] | None:
    """Return the numbers of the layers that have an attention; None if there is none."""
    if model.family is not None:
        return [0]
    blocks = [layer.blocks for layer in model.layers for _ in range(layer.copies)]
    return [n for n, own in enumerate(blocks) if any(block.kind == "attention" for block in own)] or None


def _stacks_badly(adapt: Sequence[Spec], entry: Spec) -> bool:
    """Return whether a role and a path may meet at a weight, which GC021 refuses unless the rows are the same."""
    roles = ["role" in each.get("target", {"role": 1}) for each in (*adapt, entry)]
    return len(set(roles)) > 1
