"""What an adapter does to a checkpoint, as data that knows no model: changes of rows of stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.base import MethodSpec

__all__ = ["AdapterUpdates", "Replacement", "SiteUpdate"]


@dataclass(frozen=True)
class SiteUpdate:
    """One adaptation of one linear map.

    Attributes:
        adaptation: its name.
        spec: the adaptation with the site's values applied; it looks at no role any more.
        site: where, as text.
        weight: its rows of the stored weight, by the name that the weight has in the checkpoint.
        bias: the same of the bias; None where there is none.
        lookup: the weight is a table of embeddings, whose columns are its entries.
        parts: the adaptation's tensors there, and those that all sites share, by part: read when they are looked at.
    """

    adaptation: str
    spec: MethodSpec
    site: str
    weight: WeightSlice
    bias: WeightSlice | None
    lookup: bool
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Replacement:
    """A trained copy that stands in for a whole stored tensor, below everything that stands at sites.

    Attributes:
        adaptation: who trained it.
        tensor: name of the tensor in the checkpoint.
        value: the copy.
    """

    adaptation: str
    tensor: str
    value: Tensor


@dataclass(frozen=True)
class AdapterUpdates:
    """An adapter.

    Attributes:
        kind: ``artifact`` or ``peft``.
        updates: in the order in which they apply.
        replacements: of whole tensors.
        digest: SHA-256 that tells it from other adapters.
        base: fingerprint of the base that it is for; empty where it does not say.
        spec: the document, as text.
    """

    kind: str
    updates: tuple[SiteUpdate, ...]
    replacements: tuple[Replacement, ...]
    digest: str
    base: str
    spec: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adaptations, in order."""
        replaced = [item.adaptation for item in self.replacements]
        return tuple(dict.fromkeys([*replaced, *(update.adaptation for update in self.updates)]))
