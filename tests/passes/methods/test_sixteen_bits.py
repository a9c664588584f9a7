"""Evidence on bases in 16 bits: folds and collapses are computed in float64, whatever the graph's types are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.testing.families import tiny
from tests.kit.models import adapted

EXPERTS = {"role": "experts"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.full
@pytest.mark.parametrize(
    ("entry", "family", "dtype"),
    [
        ({"method": "unipelt"}, "gpt2", FP32),
        ({"method": "unipelt", "tokens": "real"}, "bert", FP32),
        ({"method": "unipelt", "tokens": "real"}, "t5", BF16),
        ({"method": "mam"}, "t5", FP16),
        ({"method": "adamix"}, "mixtral", BF16),
        ({"method": "diff_pruning", "density": 0.02, "target": EXPERTS}, "mixtral", FP16),
    ],
    ids=lambda value: value["method"] if isinstance(value, dict) else str(value).removeprefix("torch."),
)
def test_saving(entry: dict[str, Any], family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """An artifact has the certificate of its folds, and the distance of collapsed adaptations from the trained ones."""
    compiled = adapted(tiny(family, dtype=dtype), entry)
    compiled.save(tmp_path / "artifact")
    assert (tmp_path / "artifact" / "manifest.json").is_file()


@pytest.mark.full
@pytest.mark.parametrize(
    ("entry", "dtype"),
    [
        ({"method": "lora", "rank": 2, "target": EXPERTS}, BF16),
        ({"method": "lora", "rank": 9, "target": EXPERTS}, FP16),
        ({"method": "full", "target": EXPERTS}, BF16),
        ({"method": "last_layers", "count": 1}, FP16),
    ],
    ids=lambda value: f"{value['method']} {value.get('rank', '')}" if isinstance(value, dict) else str(value)[6:],
)
def test_merging_experts(entry: dict[str, Any], dtype: torch.dtype) -> None:
    """Kernels for experts in 16 bits have no float64, and need rows of 16 bytes whatever the rank is."""
    certificate = adapted(tiny("mixtral", dtype=dtype), entry).merge().certificate
    assert certificate.passed
    assert all(site.change > 0 for site in certificate.sites)
