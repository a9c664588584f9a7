"""Update retention: how much of an update survives rounding, on hand-computed numbers and on sums over parts."""

from __future__ import annotations

import pytest
import torch

from graftc.compiler.folding.retention import retention_of
from graftc.records.retention import Retention


def _retention(base: torch.Tensor, update: torch.Tensor, dtype: torch.dtype) -> Retention:
    exact = base.double() + update
    return retention_of(base, exact, exact.to(dtype))


def test_by_hand() -> None:
    # Around 1, bfloat16 has steps of 2^-7: half a step or more is rounded up, less is lost, and 0 is not an update.
    base = torch.ones(4, dtype=torch.bfloat16)
    step = 2.0**-7
    retention = _retention(base, torch.tensor([0.25, 0.75, 2.0, 0.0], dtype=torch.float64) * step, torch.bfloat16)
    exact = (0.25**2 + 0.75**2 + 4) * step**2
    assert retention.wanted == 3
    assert retention.changed == 2
    assert retention.entries == 2 / 3
    assert retention.norm == pytest.approx((0.75 + 4) * step**2 / exact, rel=1e-15)
    assert retention.error == pytest.approx(((0.25**2 + 0.25**2) * step**2 / exact) ** 0.5, rel=1e-15)
    assert not retention.unchanged


def test_lost_and_kept() -> None:
    base = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    tiny = torch.full((8, 6), 1e-12, dtype=torch.float64)
    lost = _retention(base, tiny, torch.bfloat16)
    assert (lost.norm, lost.error, lost.entries, lost.unchanged) == (0, 1, 0, True)
    kept = _retention(base, tiny * 1e9, torch.float64)
    assert kept.entries == 1
    assert kept.norm == pytest.approx(1, rel=1e-12)
    assert kept.error < 1e-12
    none = _retention(base, tiny * 0, torch.bfloat16)
    assert (none.norm, none.error, none.entries, none.unchanged) == (1, 0, 1, True)


def test_parts_add_up() -> None:
    rng = torch.Generator().manual_seed(1)
    base = torch.randn(9, 5, generator=rng).bfloat16()
    update = torch.randn(9, 5, generator=rng, dtype=torch.float64) * 1e-2
    whole = _retention(base, update, torch.bfloat16)
    parts = [_retention(base[a:b], update[a:b], torch.bfloat16) for a, b in ((0, 4), (4, 5), (5, 9))]
    total = Retention.total(parts)
    assert (total.wanted, total.changed) == (whole.wanted, whole.changed)
    for name in ("norm", "error", "entries"):
        assert getattr(total, name) == pytest.approx(getattr(whole, name), rel=1e-13)
