"""Saving and loading the adapters of a quantised base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.perturbing import perturb


def saved_and_loaded(folder: Path, compiled: Any, ids: Tensor) -> tuple[Path, Path]:
    """Save adapters as an artifact and as a file of the state dict, and return both paths.

    Both have to load to the same logits.
    """
    perturb(compiled, 0.1)
    places = folder / "adapter", folder / "model.safetensors"
    compiled.save(places[0], certify=False)
    save_file({k: v.contiguous() for k, v in compiled.state_dict().items()}, places[1])
    with torch.no_grad():
        expected = compiled.eval()(input_ids=ids).logits
        for place in places:
            assert torch.equal(graftc.load(place).eval()(input_ids=ids).logits, expected)
    return places


def require_refused(places: tuple[Path, Path], other: Any) -> None:
    """Check that the saved adapters do not load on another base."""
    for place in places:
        with pytest.raises(GraftError, match="GC087"):
            graftc.load(place, other)
