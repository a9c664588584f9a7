"""The cells that compare methods with PEFT, in the order of the file and of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.cells import Cell, Part

SEED, RATE, STEPS, NOISE = 0, 1e-3, 50, 0.02
DTYPES = ("float32", "float64", "bfloat16")
LAYERS = ("attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down")
_LINEAR = {"target": {"role": [*LAYERS]}}
_RANK = {**_LINEAR, "rank": 8}
_SCALED = {**_RANK, "alpha": 16}
_BUDGET = {"rank": 12, "target_rank": 8, "warmup_steps": 10, "final_steps": 20, "interval": 5, "total_steps": 100}

DECODERS = ("smollm2", "tiny-llama")
"""Models whose float64 cells belong to the part ``exact``."""

METHODS: Mapping[str, Mapping[str, Any]] = {
    "LoRA": {"method": "lora", **_SCALED},
    "rsLoRA": {"method": "lora", **_SCALED, "rslora": True},
    "DoRA": {"method": "dora", **_SCALED},
    "AdaLoRA": {"method": "adalora", **_LINEAR, **_BUDGET},
    "IA3": {"method": "ia3"},
    "VeRA": {"method": "vera", **_LINEAR, "rank": 64},
    "LoHa": {"method": "loha", **_SCALED},
    "LoKr": {"method": "lokr", **_SCALED},
    "OFT": {"method": "oft", **_LINEAR, "block_size": 16},
    "BOFT": {"method": "boft", **_LINEAR, "block_size": 8},
    "MiSS": {"method": "miss", **_RANK},
    "MiSS, bat": {"method": "miss", **_RANK, "variant": "bat"},
    "MiSS, mini": {"method": "miss", **_RANK, "variant": "mini", "mini_rank": 2},
    "SHiRA": {"method": "shira", **_RANK},
    "Lily": {"method": "lily", **_RANK},
    "C3A": {"method": "c3a", **_LINEAR, "block_size": 64},
    "GraLoRA": {"method": "gralora", **_SCALED, "k": 2},
    "HiRA": {"method": "hira", **_RANK},
    "LN tuning": {"method": "norms"},
    "Trainable tokens": {"method": "rows", "target": {"modules": ["**.word_embeddings"]}, "rows": [*range(1996, 2060)]},
}
"""An entry of a spec's ``adapt`` for every type of docs/peft.md that has one on an encoder."""

CAUSAL: Mapping[str, Mapping[str, Any]] = {
    "aLoRA": {"method": "alora", **_SCALED, "invocation": [1, 4093]},
    "Prompt tuning": {"method": "prompt", "length": 16},
    "Prefix tuning": {"method": "prefix", "length": 16, "positions": "shifted", "window": "masked"},
}
"""The types that PEFT has for causal models only, or computes differently for classifiers."""

DECODER: Mapping[str, Mapping[str, Any]] = {
    "Trainable tokens": {"target": {"modules": ["**.embed_tokens"]}, "rows": [*range(260, 324)]},
}
"""Fields that differ for a decoder."""

TINY: Mapping[str, Mapping[str, Any]] = {
    "Trainable tokens": {"rows": [*range(5, 40)]},
    "C3A": {"block_size": 8},
    "VeRA": {"rank": 16},
    "aLoRA": {"invocation": [7, 9]},
}
"""Fields that differ for a tiny model."""

BATCHES: Mapping[str, tuple[int, int]] = {
    "minilm": (4, 32),
    "smollm2": (1, 32),
    "tiny-bert": (4, 12),
    "tiny-llama": (2, 12),
}
"""Texts in a batch, and tokens of a text at most."""


def entry(name: str, model: str) -> dict[str, Any]:
    """Return the entry of a spec's ``adapt`` for a row of the table."""
    fields = {**METHODS, **CAUSAL}[name]
    decoder, tiny = model in DECODERS, model.startswith("tiny-")
    own = {**fields, **(DECODER.get(name, {}) if decoder else {}), **(TINY.get(name, {}) if tiny else {})}
    if decoder and "role" in own.get("target", {}):
        own["target"] = {"role": [*LAYERS, "ffn.gate"]}
    return own


def compared(quick: bool = False) -> tuple[Cell, ...]:
    """Return the cells of both parts, in the order of the page."""
    models = ("tiny-bert", "tiny-llama") if quick else ("minilm", "smollm2")
    return (*_compared(models[0], METHODS, quick), *_compared(models[1], {**METHODS, **CAUSAL}, quick))


def parity(quick: bool = False) -> Part:
    """Return the part that compares methods with PEFT, step by step."""
    return _part("parity", quick)


def exact(quick: bool = False) -> Part:
    """Return the part that compares methods with PEFT on a decoder that computes everything in float64."""
    return _part("exact", quick)


def _part(name: str, quick: bool) -> Part:
    cells = tuple(cell for cell in compared(quick) if cell.part == name)
    return Part(name, f"experiments.{name}:figures", "experiments.parity_plan:model_files", lambda _: cells)


def model_files(cell: Cell) -> tuple[Path, ...]:
    """Return the files that a cell's model and batches are made of."""
    from experiments.sources import files_of

    return files_of(cell.model)


def _compared(model: str, names: Mapping[str, Any], quick: bool) -> Iterator[Cell]:
    for dtype in DTYPES:
        for name in names:
            adapt = entry(name, model)
            settings = {"adapt": adapt, "noise": NOISE, "batch": list(BATCHES[model])}
            steps = 3 if quick else STEPS
            part = "exact" if dtype == "float64" and model in DECODERS else "parity"
            yield Cell(part, name, adapt["method"], model, dtype, RATE, SEED, steps, settings)
