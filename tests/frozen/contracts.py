"""Further recorded models besides the contracts of methods: banks, other calls and quantised bases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing.contract import Contract
from tests.kit.packed_bases import FAMILIES as PACKED_FAMILIES
from tests.kit.packed_bases import FOLDING, KINDS, STAYING
from tests.kit.packed_bases import spec_of as on_packed
from tests.passes.graph.test_bank import METHODS as BANKABLE
from tests.passes.graph.test_bank import WITHOUT_WORDS
from tests.passes.graph.test_bank import spec_of as bank_of

GENERATING = ("gpt2", "gpt_neox", "llama", "mixtral", "t5")
CALLED: Mapping[str, Mapping[str, Any]] = {
    "lora": {"rank": 3, "target": {"role": "attn.{q,v}"}},
    "dora": {"rank": 3, "target": {"role": "attn.{q,v}"}},
    "ia3": {"target": {"role": ["attn.k", "attn.v", "attn.o"]}, "side": "auto"},
    "houlsby": {"bottleneck": 6},
    "prefix": {"length": 3},
    "p_tuning_v2": {"length": 3},
    "prompt": {"length": 3},
    "pasta": {"special_tokens": list(range(40))},
}
"""Settings of methods by their tags: one of each kind that differs where a past is given."""


class FromSpec(Contract):
    """A spec on a family's model.

    Attributes:
        whole: the spec.
        slots: the names in its bank; empty without one.
        generates: whether other calls of a language model are recorded.
        merging: options of merging.
    """

    def __init__(
        self, whole: Mapping[str, Any], slots: Sequence[str] = (), generates: bool = False, **merging: Any
    ) -> None:
        self.whole, self.slots, self.generates, self.merging = whole, slots, generates, merging

    def compiled(self, family: str, model: Any, seed: int = 0) -> Compiled:
        """Return the model, adapted according to the spec."""
        return graftc.compile(dict(self.whole), model, seed=seed)


def others() -> Iterator[tuple[str, FromSpec, str]]:
    """Yield each contract with its name and the family that it is recorded on."""
    slots = ("de", "fr", "it")
    for method in BANKABLE:
        for family in ("bert", "llama", "t5", "vit"):
            if (family, method) not in WITHOUT_WORDS:
                yield f"bank.{method}", FromSpec(bank_of(method, slots), slots, family in GENERATING), family
    for method, setting in CALLED.items():
        for family in GENERATING:
            yield f"calls.{method}", FromSpec({"adapt": [{"method": method, **setting}]}, generates=True), family
    for kind in KINDS:
        for method in (*FOLDING, *STAYING):
            for family in PACKED_FAMILIES:
                yield (
                    f"quantised.{kind}.{method}",
                    FromSpec(on_packed(family, method, quantize=kind), base="full"),
                    family,
                )
