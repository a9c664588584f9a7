"""Quantised bases in ONNX Runtime: every family, method and packing, with adapters in the graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.packed_bases import FAMILIES, FOLDING, KINDS, STAYING, in_onnx_runtime

pytestmark = pytest.mark.gate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [*FOLDING, *STAYING])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family: str, method: str, kind: str, tmp_path: Path) -> None:
    """The exported file agrees with the compiled model and keeps weights packed."""
    in_onnx_runtime(family, method, kind, tmp_path)
