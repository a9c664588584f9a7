"""Sparse fine-tuning with fixed selections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from graftc.testing import MethodContract


class TestMask(MethodContract):
    """Random entries of every tensor."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "mask", "selection": "random", "density": 0.3}


class TestMagnitude(MethodContract):
    """The largest entries of projections."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {
        "method": "mask",
        "selection": "magnitude",
        "entries": 500,
        "target": {"role": ["attn.q", "attn.v"]},
    }
