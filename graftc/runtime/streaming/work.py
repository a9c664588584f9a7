"""Fold one file of a checkpoint block by block into a copy on disk, then read the copy back and compare it.

The same code verifies existing files, and measures folds without writing any.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from graftc.compiler.folding.certify import Advance
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.headers import Shard, StoredTensor
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.runtime.streaming.merge_plan import MergePlan
from graftc.runtime.streaming.side_by_side import folding
from graftc.runtime.streaming.site_fold import Folds, RowTarget, fold_copy
from graftc.runtime.streaming.sites import rows_that_fit

_CHUNK = 2**22
"""The number of bytes or entries to compare at a time."""
Progress = Callable[[int, int], None]
"""A function that receives the number of the base's bytes processed so far, and their total."""


def shards(checkpoint: TensorFolder, progress: Progress) -> Iterator[tuple[Shard, Advance]]:
    """Yield a checkpoint's files, each with a function to call with the completed fraction, from 0 to 1.

    Args:
        checkpoint: the files, which are released one after the other.
        progress: called with the number of bytes processed so far, and their total.
    """
    done = 0
    for shard in checkpoint.shards:

        def advance(part: float, before: int = done, size: int = shard.size) -> None:
            progress(before + int(part * size), checkpoint.size)

        yield shard, advance
        checkpoint.release()
        done += shard.size


def fold_shard(plan: MergePlan, shard: Shard, target: RowTarget, advance: Advance) -> Folds:
    """Fold all sites in a file, and compare the stored result with the unfolded computation.

    Args:
        plan: the merge.
        shard: the base's file.
        target: the destination of folded rows.
        advance: called with the completed fraction.

    Returns:
        What was measured, with the slices of tensors that were folded in this file.

    Raises:
        GraftError: if an update is not a fold.
    """
    folds = Folds()
    sites = [site for site in plan.sites if any(own.tensor in shard.tensors for own in site.slices)]
    copies = [item for name, item in plan.replacements.items() if name in shard.tensors]
    sizes = [site.weight.size for site in sites] + [item.value.numel() for item in copies]
    total, done = max(1, sum(sizes)), 0
    with folding(plan, sites, target) as measured:
        for site, measures in zip(sites, measured, strict=True):
            folds.add(measures)
            done += site.weight.size
            advance(done / total)
    for copy in copies:  # only the rows that no fold has written, since folds start from the copy
        rest = _complement([own for own in folds.changed if own.tensor == copy.tensor], shard.tensors[copy.tensor])
        for _, own in rest.blocks(rows_that_fit(rest.size // max(1, rest.count))) if rest is not None else ():
            folds.add(fold_copy(plan, copy, own, target))
            done += own.size
            advance(min(1.0, done / total))
    return folds


def untouched(
    plan: MergePlan, shard: Shard, written: TensorFolder, changed: Collection[WeightSlice]
) -> Iterator[tuple[str, bool]]:
    """Yield the name of every tensor that folding does not change, and whether it equals the base's, bit for bit.

    If some of a tensor's rows were folded, the other rows are compared. A tensor that is missing or has another shape
    counts as different.

    Args:
        plan: the merge.
        shard: the base's file.
        written: the written files.
        changed: the slices that were folded in this file.
    """
    owned: dict[str, list[WeightSlice]] = {}
    for own in changed:
        owned.setdefault(own.tensor, []).append(own)
    for name, stored in shard.tensors.items():
        entry = written.entries.get(name)
        if entry is None or entry.shape != stored.shape:
            yield name, False
        elif entry.dtype == stored.dtype and name not in owned and name not in plan.replacements:
            yield name, _same(written.raw(name), plan.checkpoint.raw(name))
        elif (rest := _complement(owned.get(name, []), stored)) is not None and name not in plan.replacements:
            pairs = zip(rest.views(written[name]), rest.views(plan.checkpoint[name]), strict=True)
            yield name, all(_same(a, b) for a, b in pairs)


def _complement(slices: Sequence[WeightSlice], stored: StoredTensor) -> WeightSlice | None:
    """Return the rows of a tensor that belong to none of the given slices; None if there are none."""
    if not slices:
        return WeightSlice(stored.name, stored.shape)
    spans = sorted(span for own in slices for span in own.spans)
    edges = [0, *(edge for span in spans for edge in span), slices[0].total]
    rest = tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
    return slices[0].at(rest) if rest else None


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same(tensor: Tensor, base: Tensor) -> bool:
    """Return whether two tensors have the same bits, piece by piece; the second is widened to the first one's dtype."""
    if not tensor.dim():
        tensor, base = tensor.reshape(1), base.reshape(1)
    rows = max(1, _CHUNK * len(tensor) // max(1, tensor.numel()))
    for own, other in zip(torch.split(tensor, rows), torch.split(base, rows), strict=True):
        bits = _BITS[tensor.dtype.itemsize]
        if not torch.equal(own.view(bits), other.to(tensor.dtype).view(bits)):
            return False
    return True
