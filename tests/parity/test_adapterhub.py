"""Bottleneck adapters compared with tensors from AdapterHub's `adapters`: its wirings, options and stacks.

``seq_bn_post_add`` and ``seq_bn_after_ln`` are left out: the residual of their adapters is not the branch, so that zero
adapters are not the base, and no spec can express that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.parity.adapterhub import ARCHITECTURES, TOLERANCE, reference, with_their_tensors

Entry = Mapping[str, Any]
DOUBLE: Entry = {"method": "houlsby", "bottleneck": None, "reduction": 6, "activation": "silu"}
SEQ: Entry = {"method": "pfeiffer", "reduction": 5}
PAR: Entry = {"method": "he_parallel", "bottleneck": None, "reduction": 3}
WIRED = {"method": "bottleneck", "reads": "output", "adds_to": "branch"}

CASES: Mapping[str, tuple[Entry, ...]] = {
    "double_seq_bn": (DOUBLE,),
    "double_seq_bn_relu": ({**DOUBLE, "activation": "relu"},),
    "seq_bn": (SEQ,),
    "seq_bn_own_norms": ({**WIRED, "reduction": 5, "norm": "both"},),
    "par_bn": (PAR,),
    "par_bn_learned": ({**PAR, "scale": "learned"},),
    "stack": ({**SEQ, "name": "a"}, {**SEQ, "name": "b"}),
}
GENERAL: Mapping[str, Entry] = {
    "double_seq_bn": {
        **{"method": "bottleneck", "target": {"role": ["attn.sublayer", "ffn.sublayer"]}},
        **{"reads": "branch", "adds_to": "branch", "reduction": 6, "activation": "silu"},
    },
    "seq_bn": {**WIRED, "reduction": 5},
    "par_bn": {"method": "bottleneck", "reads": "stream", "adds_to": "branch", "reduction": 3, "scale": 4.0},
}
"""The main cases again, wired by hand."""
PAIRS = [(arch, case) for arch in ARCHITECTURES for case in CASES if case in reference(arch).about["cases"]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_base_is_the_same(arch: str) -> None:
    for name, difference in reference(arch).differences("unadapted", reference(arch).base()):
        assert difference <= TOLERANCE, f"{name}: {difference:.2e}"


@pytest.mark.full
@pytest.mark.parametrize(("arch", "case"), PAIRS)
def test_outputs(arch: str, case: str) -> None:
    check(arch, case, *CASES[case])


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("case", GENERAL)
def test_outputs_of_the_mechanism(arch: str, case: str) -> None:
    check(arch, case, GENERAL[case])


def check(arch: str, case: str, *entries: Entry) -> None:
    """Check that last hidden state and logits are AdapterHub's to 1e-5, and that without adapters they are not."""
    compiled = with_their_tensors(arch, case, *entries)
    for name, difference in reference(arch).differences(case, compiled):
        assert difference <= TOLERANCE, f"{name} differs by {difference:.2e} from AdapterHub's"
    assert min(d for _, d in reference(arch).differences(case, reference(arch).base())) > 0.05


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "other"),
    [("seq_bn", {"reads": "branch"}), ("seq_bn", {"adds_to": "output"}), ("par_bn", {"reads": "branch"})],
    ids=["reads before the norm", "adds behind the norm", "reads the branch"],
)
def test_another_wiring_is_told_from_it(case: str, other: dict[str, str]) -> None:
    """Other wirings have the same number of tensors, but give other values."""
    compiled = with_their_tensors("bert", case, {**GENERAL[case], **other})
    assert min(d for _, d in reference("bert").differences(case, compiled)) > 1e-2


@pytest.mark.sample("seq_bn_after_ln")
@pytest.mark.full
@pytest.mark.parametrize("case", ["seq_bn_post_add", "seq_bn_after_ln"])
def test_other_residuals_are_told_apart(case: str) -> None:
    """Pfeiffer's wiring with the adapters of these cases gives other values."""
    compiled = with_their_tensors("bert", case, SEQ)
    assert min(d for _, d in reference("bert").differences(case, compiled)) > 1e-2


@pytest.mark.full
def test_order_in_a_stack() -> None:
    """The first adaptation runs first."""
    compiled = with_their_tensors("bert", "stack", {**SEQ, "name": "a"}, {**SEQ, "name": "b"})
    tensors = compiled.adapter_state_dict()
    turned = {
        n.replace(".a.", ".?.").replace(".b.", ".a.").replace(".?.", ".b."): t.clone() for n, t in tensors.items()
    }
    assert turned.keys() == tensors.keys()
    compiled.load_adapter_state_dict(turned)
    assert min(d for _, d in reference("bert").differences("stack", compiled)) > 1e-3
