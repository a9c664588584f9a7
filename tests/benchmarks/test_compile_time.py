"""The benchmark of compile times measures what it should, and its table shows all of it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compile_time import ADAPTATIONS, DEPTHS, MODELS, RUNS, STACKED, measure_growth, table


@pytest.mark.slow
def test_nodes_and_sites_grow_with_layers_and_adaptations() -> None:
    one, two = measure_growth(1, 1), measure_growth(1, 2)
    assert (one["sites"], two["sites"]) == (7, 14)
    assert two["nodes"] > one["nodes"] > 50
    assert min(one["seconds"], two["seconds"]) > 0


def test_every_run_is_in_the_table() -> None:
    """The runs reach 10,000 nodes, 64 adaptations and 4,000 sites, and all are in the table."""
    assert max(ADAPTATIONS) == 64 and 7 * STACKED * max(ADAPTATIONS) > 4000 and max(DEPTHS) == 160
    runs: dict[str, dict[str, Any]] = {name: {"seconds": 2.5, "nodes": 1000, "sites": 63} for name in RUNS}
    for name in ("BERT base", *MODELS):
        runs[name] = {"capture": 1.25, "first": 2.5, "second": 0.5, "sites": 24}
    runs["BERT base"]["capture_one_by_one"] = 3.75
    head = {"versions": {"torch": "2"}, "command": "it", "machine": "one", "load": "1.0", "repeat": 3}
    text = table({**head, "runs": runs})
    assert "| BERT base | 24 | 1.25 | 3.75 | 2.50 | 0.50 |" in text
    assert "| Llama 405B | 24 | 1.25 | - | 2.50 | 0.50 |" in text
    assert all(f"| {name} |" in text for name in RUNS)
