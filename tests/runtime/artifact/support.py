"""A small base on disk, and artifacts made from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graftc
from graftc.runtime.artifact.manifest import sealed
from graftc.runtime.sources.models import load_model, quiet_transformers
from graftc.testing import perturb
from graftc.testing.families import tiny

SPEC: dict[str, Any] = {
    "adapt": [
        {"name": "attention", "method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4, "dropout": 0.1},
        {"name": "inner", "method": "lora", "target": {"role": "ffn.down"}, "rank": 2},
    ]
}


def saved_base(folder: Path, family: str = "bert", seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model as a transformers folder and return the folder."""
    with quiet_transformers():
        tiny(family, seed=seed, **changes).save_pretrained(folder)
    return folder


def adapted(base: Path, spec: Any = None, **options: Any) -> Any:
    """Return the compiled model of a folder, with perturbed adapters."""
    compiled = graftc.compile(spec or SPEC, load_model(str(base)), **options)
    perturb(compiled)
    return compiled


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Return the contents of every file in a folder, by path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def edit_manifest(artifact: Path, **changes: Any) -> None:
    """Change fields of a manifest and seal it again, as an attacker would."""
    data = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    data.pop("digest")
    for name, change in changes.items():
        data[name] = change(data[name]) if callable(change) else change
    (artifact / "manifest.json").write_text(sealed(data), encoding="utf-8")


class Own(nn.Module):
    """A model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return three scores."""
        return self.outer(torch.relu(self.inner(x)))


def own() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return such a model and example inputs, with the same weights each time."""
    torch.manual_seed(7)
    return Own().eval(), {"x": torch.zeros(2, 6)}


def mend(artifact: Path) -> None:
    """Seal an artifact in its current state: sizes and digests of all files, and the manifest's own."""
    from graftc.runtime.artifact.write import listed

    edit_manifest(artifact, files=dict(listed(artifact)))


def edit_json(artifact: Path, name: str, change: Any) -> None:
    """Change the data of a JSON file of an artifact, or replace it by a text, and seal the artifact again."""
    file = artifact / name
    if isinstance(change, str):
        file.write_text(change, encoding="utf-8")
    else:
        data = json.loads(file.read_text(encoding="utf-8"))
        changed = change(data)
        file.write_text(json.dumps(data if changed is None else changed, ensure_ascii=False), encoding="utf-8")
    mend(artifact)
