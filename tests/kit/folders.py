"""Tiny models and artifacts on disk, and what folders contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftc.runtime.sources.models import load_model, quiet_transformers
from graftc.testing import perturb, tiny
from tests.kit.models import fresh

SPEC: dict[str, Any] = {
    "adapt": [
        {"name": "attention", "method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4, "dropout": 0.1},
        {"name": "inner", "method": "lora", "target": {"role": "ffn.down"}, "rank": 2},
    ]
}


def saved_base(folder: Path, family: str = "bert", **changes: Any) -> Path:
    """Save a tiny model as a transformers folder, and return the folder; ``changes`` are arguments of `tiny`."""
    with quiet_transformers():
        tiny(family, **changes).save_pretrained(folder)
    return folder


def adapted_folder(base: Path, spec: Mapping[str, Any] = SPEC) -> Any:
    """Return the compiled model of a folder, with random values in its adapters."""
    compiled = fresh(load_model(str(base)), **spec)
    perturb(compiled)
    return compiled


def saved_artifact(folder: Path, *, certify: bool = True, **changes: Any) -> Path:
    """Save a tiny BERT as ``base`` in a folder, and an artifact of it as ``artifact``, whose path is returned."""
    compiled = adapted_folder(saved_base(folder / "base", **changes))
    return Path(compiled.save(folder / "artifact", certify=certify))


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file in a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
