"""Random configurations of the methods that peft and graftc both have, judged by the installed peft.

Each is saved by peft with perturbed tensors, imported, compared (outputs, gradients, merged outputs), exported, loaded
by peft and compared again. A sample runs with the usual tests.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.kit.releases import needs
from tests.runtime.interop.judged import run
from tests.runtime.interop.matrix import COUNT, EXPERTS, FIVE, KINDS, PAIRS, Case, cases

pytest.importorskip("peft")

REFUSED = {
    "ensure_weight_tying": "a table and the head that is tied to it have one pair of factors",
    "target_modules": "of LoKr's full factor at a convolution over a line, peft's product mixes axes",
}
"""Fields of configs for which the import may say GC112, and why."""

SHARE = 0.9
"""How many have to be equal."""

FULL = pytest.mark.full
SAMPLE = [
    *(Case(kind, "convs", 0) for kind in ("attention", "convolutions", "ia3-convs")),
    Case("ia3-convs", "convs", 4),  # scales the channels of a convolution over several points
    Case("lokr", "convs", 1),
    *(
        pytest.param(case, marks=FULL)
        for case in (
            Case("tied-saved", "tied", 0),
            Case("loha", "convs", 0),
            Case("miss", "bart", 0),
            Case("shira", "t5", 0),
            Case("lily", "t5", 0),
            Case("wide", "bert", 0),
            Case("tied-saved", "tied", 1),
            Case("experts", "mixtral", 0),
            Case("experts", "qwen3_moe", 0),
            Case("all-linear", "mixtral", 0),
            Case("parameters", "llama4", 1),
            Case("tokens", "t5", 0),
            Case("tokens", "bart", 0),
        )
    ),
]
"""Cases that were once refused, though peft creates such adapters and a method expresses them."""


@pytest.mark.slow
@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_sample_is_equal(case: Case, tmp_path: Path) -> None:
    result = run(case, tmp_path)
    assert not result.failure and result.refused is None, (result.failure, result.refused)


def test_one_pair_of_factors_for_a_table_and_its_head_is_refused_by_its_field(tmp_path: Path) -> None:
    needs("peft", "0.19", "earlier ones ignore ensure_weight_tying of targets")
    assert run(Case("tied-target", "tied", 0), tmp_path).refused == ("GC112", "ensure_weight_tying")


def test_the_cases_are_drawn_from_every_family_of_methods_and_models() -> None:
    drawn = cases()
    assert len(drawn) == len(set(drawn)) == COUNT
    assert {case.kind for case in drawn} == set(KINDS)
    assert {*FIVE, *EXPERTS, *PAIRS, "tied", "convs"} <= {case.family for case in drawn}
    assert all(str(case.config().peft_type) for case in drawn)


@pytest.mark.gate
def test_all_are_equal_but_for_listed_fields(tmp_path: Path) -> None:
    equal: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    largest: dict[str, float] = defaultdict(float)
    wrong: list[str] = []
    for case in cases():
        result = run(case, tmp_path / str(case))
        method = KINDS[case.kind].method
        whole[method] += 1
        if result.failure:
            wrong.append(f"{case}: {result.failure}")
        elif result.refused is not None:
            refused[result.refused[1]] += 1
        else:
            equal[method] += 1
            for name, difference in result.differences.items():
                largest[name] = max(largest[name], difference)
    for method, count in sorted(whole.items()):
        print(f"{method}: {equal[method]} of {count} equal")
    print(f"{equal.total()} of {COUNT} equal; refused: {dict(refused)}; largest differences: {dict(largest)}")
    assert not wrong, "\n".join(wrong)
    assert set(refused) <= set(REFUSED)
    assert equal.total() >= SHARE * COUNT
