"""LT-SFT: both trainings, what goes from one to the next, and fine-tunes on one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from graftc.testing import MethodContract


class TestDense(MethodContract):
    """Everything trains."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "lt_sft", "penalty": 0.1}


class TestSparse(MethodContract):
    """Chosen entries train."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "lt_sft", "stage": 2, "density": 0.3}
