"""An adapter's changes to rows of stored weights, as data that does not depend on a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.weights.folds import FoldStep
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.base import MethodSpec


@dataclass(frozen=True)
class SiteUpdate:
    """One adaptation of one linear map.

    Attributes:
        adaptation: its name.
        spec: the adaptation with the site's values applied; it no longer depends on roles.
        site: the site, as text.
        weight: the adapted rows of the stored weight, under the weight's name in the checkpoint.
        bias: the same rows of the bias; None if there is none.
        lookup: whether the weight is an embedding table, whose columns are its entries.
        read: a function that returns the adaptation's tensors at the site, and those that all sites share, by part.
    """

    adaptation: str
    spec: MethodSpec
    site: str
    weight: WeightSlice
    bias: WeightSlice | None
    lookup: bool
    read: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Replacement:
    """A trained copy that replaces a whole stored tensor; updates to sites are applied on top of it.

    Attributes:
        adaptation: the name of the adaptation that trained it.
        site: the tensor's name in the model.
        tensor: its name in the checkpoint.
        value: the copy.
    """

    adaptation: str
    site: str
    tensor: str
    value: Tensor

    def step(self, own: WeightSlice, rows: WeightSlice) -> FoldStep:
        """Return the step that replaces rows.

        Args:
            own: the rows' slice in the group that is folded.
            rows: their slice in the checkpoint.
        """
        return FoldStep.of_copy(self.adaptation, self.site, own, lambda: rows_of(rows, self.value))


def rows_of(own: WeightSlice, stored: Tensor) -> Tensor:
    """Return a slice's rows as the map uses them: a view of the stored tensor if they are one run."""
    views = own.views(stored)
    return views[0] if len(views) == 1 else torch.cat(views, own.row_axis)


@dataclass(frozen=True)
class AdapterUpdates:
    """All changes that an adapter makes.

    Attributes:
        kind: ``artifact`` or ``peft``.
        updates: updates to sites, in the order in which they apply.
        replacements: replacements of whole tensors.
        digest: SHA-256 that identifies the adapter.
        base: fingerprint of the adapter's base; empty if the adapter does not record one.
        spec: the spec, or peft's config, as text.
        order: names of the model's tensors, in the order in which sites are listed.
    """

    kind: str
    updates: tuple[SiteUpdate, ...]
    replacements: tuple[Replacement, ...]
    digest: str
    base: str
    spec: str
    order: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adaptations, in order."""
        replaced = [item.adaptation for item in self.replacements]
        return tuple(dict.fromkeys([*replaced, *(update.adaptation for update in self.updates)]))
