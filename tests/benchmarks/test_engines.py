"""The comparison of serving engines: rounds, ratios, engines that cannot run, and wrong tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import FORMS, PROMPTS, REFERENCE, Contestant, _lines, child, measured
from graftc.runtime.serving.running import DRIVERS
from graftc.specs.errors.diagnostics import GraftError
from tests.applications.serving.served_base import artifact, base_folder

ROWS = [[1, 2], [3, 4], [5, 6]]


def test_every_engine_that_can_be_run_has_forms() -> None:
    assert set(DRIVERS) < set(FORMS) and REFERENCE in {f"{engine}, merged" for engine in FORMS}


def test_rounds_and_ratios() -> None:
    """Contestants take turns in both orders; the first prompt does not count, and an engine that fails is left out."""
    base = Path("base")
    every = [Contestant("transformers", "merged", base, None), Contestant("genai", "merged", base, None)]
    every += [Contestant("genai", "unmerged", base, base), Contestant("vllm", "merged", base, None)]
    order = []

    def run(one: Contestant) -> tuple[list[list[int]], list[float]]:
        order.append(one.name)
        if one.engine == "vllm":
            raise GraftError("GC061", "vllm is not installed")
        cost = {"transformers": 2.0, "genai": 1.0}[one.engine] * (1.5 if one.kind == "unmerged" else 1.0)
        return ROWS, [9.0, cost, cost]

    seconds, tokens, skipped = measured(every, run, 3)
    assert order == [
        *(one.name for one in every),
        *(one.name for one in every[2::-1]),
        *(one.name for one in every[:3]),
    ]
    assert skipped == {"vllm, merged": "vllm is not installed"} and set(tokens) == set(seconds)
    entries = {name: {"ms": [500 * sum(own[1:]) for own in times], "equal": 3} for name, times in seconds.items()}
    loads: dict[str, Any] = {"load": [0.0, 0.0, 0.0], "load_after": [0.0, 0.0, 0.0]}
    machine = {"processor": "p", "cores": 2, "threads": 2, "capability": "AVX2", **loads}
    data: dict[str, Any] = {"entries": entries, "skipped": skipped, "threads": 2, "machine": machine, "rounds": 3}
    text = "\n".join(list(_lines({**data, "command": "c", "date": "d"}))[4:])
    assert f"| genai, unmerged | 1500.0 | 0.75 | 1.50 | 3 of {PROMPTS} |" in text
    assert "| genai, merged | 1000.0 | 0.50 |  | 3" in text and "vllm, merged: skipped: vllm is not installed" in text


@pytest.mark.full
def test_contestants_in_torch_agree(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    compiled = artifact(base, "lora", tmp_path / "lora")
    compiled.merge().save(tmp_path / "merged")
    compiled.export(tmp_path / "peft", format="peft")
    request = {"prompts": [[5, 9, 2, 40]], "tokens": 4, "threads": 1}
    given = [
        ("graftc", "unmerged", "lora", None),
        ("graftc", "merged", "lora", None),
        ("transformers", "unmerged", "base", "peft"),
        ("transformers", "merged", "merged", None),
    ]
    rows = []
    for engine, kind, path, adapter in given:
        places = {"base": str(tmp_path / path), "adapter": adapter and str(tmp_path / adapter)}
        answer = child({**request, **places, "engine": engine, "kind": kind})
        assert len(answer["seconds"]) == 1
        rows.append(answer["tokens"])
    assert all(row == rows[0] for row in rows)
