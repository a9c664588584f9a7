"""Ten thousand requests from eight threads over 64 adapters in 16 slots."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftc.testing import tiny
from tests.kit.serving import IDS, traffic
from tests.runtime.interop.adapters import outputs

pytestmark = pytest.mark.gate
pytest.importorskip("peft")

REQUESTS, EARLY = 10_000, 1_000


def test_no_wrong_row_no_deadlock_no_growth(tmp_path: Path) -> None:
    """Every row equals its adapter alone, all threads end, and the process grows by at most 2 %.

    The adapters alone are compared with PEFT.
    """
    model = tiny("llama").eval()
    served = traffic(model, tmp_path, 64, 16, measured=(EARLY, REQUESTS))
    for name, folder in [*served.folders.items()][::9]:
        theirs = outputs(model, folder, IDS)[0]
        torch.testing.assert_close(served.expected[name], theirs, atol=1e-5, rtol=1e-5)
    served.run(REQUESTS)
    assert served.wrong == []
    assert served.done == REQUESTS
    counters = served.pool.counters
    print(counters, served.sizes, flush=True)
    assert counters.evictions > 1000 and counters.loads > 1000 and counters.hits > 1000
    assert served.sizes[REQUESTS] <= 1.02 * served.sizes[EARLY]
