"""The cells of the claims that the tables of training do not settle on their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from experiments.cells import Part
from experiments.tasks import texts_of
from experiments.training_plans import (
    BATCH,
    FACTORS,
    LAYERS,
    PER_CLASS,
    ROWS,
    STEPS,
    VECTORS,
    WEIGHTS,
    Row,
    Rows,
    Setting,
    classifiers,
    setting_of,
)

RANKS = (1, 4, 16, 64)
FEW = (1, 2, 4, 8, 16, 32)
"""Texts a class of the curves for little data."""
LARGE_BATCH = 4
"""How many times as many texts are in a large batch; it has as many fewer steps."""
_ATTENTION, _MLP = [*LAYERS[:4]], [*LAYERS[4:]]

BY_RANK = tuple(
    Row(f"LoRA, rank {rank}", {"method": "lora", "target": {"role": [*LAYERS]}, "rank": rank, "alpha": 16}, FACTORS)
    for rank in RANKS
)
# In a layer of MiniLM, attention has 4 maps of 384 x 384, the MLP 2 of 384 x 1536: 3,072 and 3,840 values a rank.
_SCALE = {"alpha": 16, "target": {"role": _MLP}}, {"alpha": 20, "target": {"role": _ATTENTION}}
BY_PLACE = (
    Row("LoRA, MLP, rank 8", {"method": "lora", "rank": 8, **_SCALE[0]}, FACTORS),
    Row("LoRA, attention, rank 10", {"method": "lora", "rank": 10, **_SCALE[1]}, FACTORS),
)
MIXTURE = (
    Row("AdaMix, bottleneck 16", {"method": "adamix", "bottleneck": 16}, FACTORS),
    Row("one adapter, bottleneck 16", {"method": "adamix", "bottleneck": 16, "experts": 1}, FACTORS),
)
LOW_DATA = (
    Row("full", ROWS["full"].fields, WEIGHTS),
    Row("prefix", ROWS["prefix"].fields, VECTORS),
)
BATCHES = (ROWS["full"], ROWS["LoRA"])


def usual(quick: bool = False) -> Setting:
    """Return the setting of the encoder's table, for the rows of claims."""
    return setting_of("claims", "r52", texts_of("r52", PER_CLASS), quick)


def large_batches(quick: bool = False) -> Setting:
    """Return the setting with large batches: as many texts are seen, in fewer steps."""
    rows, tokens = BATCH[0] * LARGE_BATCH, BATCH[1]
    fields: dict[str, Any] = {"batch": (rows, tokens), "steps": STEPS // LARGE_BATCH}
    return setting_of("claims", "r52", texts_of("r52", PER_CLASS), quick, **fields)


def few(per_class: int, quick: bool = False) -> Setting:
    """Return a setting with a few texts of each class of R8, and three seeds."""
    texts = texts_of("r8", per_class)
    return setting_of("claims", "r8", texts, quick, batch=(min(BATCH[0], texts), BATCH[1]), seeds=range(3))


def tables(quick: bool = False) -> Iterator[tuple[Setting, Rows]]:
    """Yield every setting with its rows, and whether they are trained with all seeds."""
    one_seed, all_seeds = dict.fromkeys(BY_RANK, False), dict.fromkeys((*BY_PLACE, *MIXTURE), True)
    if quick:
        yield usual(quick), dict([*one_seed.items()][:1])
        return
    yield usual(), {**one_seed, **all_seeds}
    yield large_batches(), dict.fromkeys(BATCHES, True)
    for per_class in FEW:
        yield few(per_class), dict.fromkeys(LOW_DATA, True)


def claims(quick: bool = False) -> Part:
    """Return the part with the cells of claims."""
    return classifiers("claims", lambda: tables(quick))
