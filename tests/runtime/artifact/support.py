"""Artifacts that are changed and sealed again, and a model that is not from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftc.runtime.artifact.manifest import sealed


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
