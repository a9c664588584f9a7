"""The contract of LT-SFT, in both trainings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from graftc.testing import MethodContract


class TestDense(MethodContract):
    """The first training, of every parameter."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "lt_sft", "penalty": 0.1}


class TestSparse(MethodContract):
    """The second training, of chosen entries."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "lt_sft", "stage": 2, "density": 0.3}
