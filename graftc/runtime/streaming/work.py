"""Folding of one file of a checkpoint, block by block into a copy on the disk, which is then read again and compared.

The same code verifies an existing file, and measures without writing one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from graftc.compiler.folding.rounding import largest, round_into, rounding_of
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.headers import Shard, StoredTensor, header_bytes
from graftc.files.tensors.mapped import DTYPES, MappedFile
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.certificate import Retention, SiteEvidence
from graftc.runtime.streaming.merge_plan import MergePlan
from graftc.runtime.streaming.places import PlaceFold, ReplacedFold

__all__ = ["BaseTensors", "RowTarget", "ShardReport", "create_file", "fold_shard", "untouched"]

_CHUNK = 2**22
"""The number of bytes or entries that are copied or compared at a time."""
Advance = Callable[[float], None]
"""Called with the part of a file that is done, from 0 to 1."""


@dataclass(frozen=True)
class ShardReport:
    """The results of folding one file.

    Attributes:
        sites: the evidence for what was folded.
        changed: the slices of weights and biases that were folded in this file.
    """

    sites: tuple[SiteEvidence, ...]
    changed: tuple[WeightSlice, ...]


class BaseTensors:
    """The base's tensors, or the trained copies that replace them."""

    def __init__(self, plan: MergePlan) -> None:
        self.folder, self._replacements = plan.checkpoint, plan.replacements

    def current(self, name: str) -> Tensor:
        """Return a tensor of the base, or the trained copy that replaces it."""
        replacement = self._replacements.get(name)
        return self.folder[name] if replacement is None else replacement.value


class RowTarget:
    """The destination of folded rows: files that are written, files that are only compared, or none.

    Args:
        names: names of the tensors that the target contains.
        tensors: the files; None to measure only.
        writes: whether to write to the files.
        dtypes: element types by tensor, needed if there are no files.
    """

    def __init__(
        self,
        names: Collection[str],
        tensors: TensorFolder | None,
        *,
        writes: bool = False,
        dtypes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._names, self._tensors, self._writes, self._dtypes = names, tensors, writes, dtypes

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def put(self, own: WeightSlice, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
        """Round rows once and store them, or compare them with the stored ones if the files are not written.

        Args:
            own: the rows, and the tensor that they belong to.
            exact: their folded values, ``float64[rows, in]``, or ``[rows]`` for a bias.
            base: their values before folding.

        Returns:
            The largest error of the stored values, in units in the last place, and how much of the update is left.
        """
        if self._tensors is None:
            return round_into(torch.empty_like(exact, dtype=DTYPES[self._dtypes[own.tensor]]), exact, base)
        views = own.views(self._tensors[own.tensor])
        sizes = [view.shape[own.row_axis] for view in views]
        parts = zip(views, torch.split(exact, sizes, own.row_axis), torch.split(base, sizes, own.row_axis), strict=True)
        return _together(self._look(*part) for part in parts)

    def _look(self, view: Tensor, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
        return (round_into if self._writes else rounding_of)(view, exact, base)


def _together(results: Iterable[tuple[float, Retention]]) -> tuple[float, Retention]:
    errors, retained = zip(*results, strict=True)
    return largest(*errors), Retention.total(retained)


def create_file(plan: MergePlan, shard: Shard, path: Path) -> None:
    """Create the file to fold into: a copy of the base's, byte for byte, or one with tensors in a wider type.

    Raises:
        OSError: if it cannot be written.
    """
    tensors = shard.tensors.values()
    if all(plan.written(stored) == stored.dtype for stored in tensors):
        shutil.copyfile(shard.path, path)
        return
    header = header_bytes(((t.name, plan.written(t), t.shape) for t in tensors), shard.metadata)
    with path.open("wb") as file:
        file.write(header)
        source = MappedFile(shard)
        for stored in tensors:
            values = source.tensor(stored).reshape(-1) if plan.written(stored) != stored.dtype else source.raw(stored)
            for start in range(0, values.numel(), _CHUNK):
                piece = values[start : start + _CHUNK]
                wide = piece.to(DTYPES[plan.written(stored)]) if piece.dtype != torch.uint8 else piece
                file.write(wide.contiguous().view(torch.uint8).numpy().data)


def fold_shard(plan: MergePlan, shard: Shard, base: BaseTensors, target: RowTarget, advance: Advance) -> ShardReport:
    """Fold everything that a file contains, and compare the stored result with the unfolded computation.

    Args:
        plan: the merge.
        shard: the base's file.
        base: the base's tensors.
        target: the destination of folded rows.
        advance: called with the part that is done.

    Raises:
        GraftError: if an update is not a fold.
    """
    sites: list[SiteEvidence] = []
    changed: list[WeightSlice] = []
    places, copies = plan.places_in(shard), plan.replaced_in(shard)
    sizes = [place.weight.size for place in places] + [item.value.numel() for item in copies]
    total, done = max(1, sum(sizes)), 0

    for place in places:
        fold = PlaceFold(place, plan.maps)
        weight, bias = place.weight, place.bias
        has_weight = weight.tensor in target
        changed += [weight] if has_weight else []
        for block in fold.blocks(base.current(weight.tensor), None if bias is None else base.current(bias.tensor)):
            if has_weight:
                fold.note(target.put(block.own, block.exact, block.base))
            if block.bias is not None and block.bias[0].tensor in target:
                own, before, after = block.bias
                fold.note(target.put(own, after, before))
                changed.append(own)
            elif not has_weight:
                break  # only the bias is in this file, and folding does not change it
            done += block.own.size
            advance(done / total)
        else:
            sites.append(fold.evidence)  # a bias in another file than its weight has separate evidence
    for item in copies:  # only the rows that no fold has written, since folds start from the copy
        rest = _complement([own for own in changed if own.tensor == item.tensor], shard.tensors[item.tensor])
        if rest is None:
            continue
        copied = ReplacedFold(item)
        for own, before, after in copied.blocks(rest, base.folder[item.tensor]):
            copied.note(target.put(own, after, before))
            done += own.size
            advance(min(1.0, done / total))
        sites.append(copied.evidence)
    return ShardReport(tuple(sites), tuple(changed))


def untouched(
    plan: MergePlan, shard: Shard, written: TensorFolder, base: BaseTensors, changed: Collection[WeightSlice]
) -> Iterator[tuple[str, bool]]:
    """Yield the name of every tensor that folding leaves alone, and whether it equals the base's, bit for bit.

    For a tensor of which some rows were folded, the other rows are compared. One that is missing, or has another shape,
    counts as different.

    Args:
        plan: the merge.
        shard: the base's file.
        written: the files that were written.
        base: the base's tensors.
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
            yield name, _same(written.raw(name), base.folder.raw(name))
        elif (rest := _complement(owned.get(name, []), stored)) is not None and name not in plan.replacements:
            pairs = zip(rest.views(written[name]), rest.views(base.folder[name]), strict=True)
            yield name, all(_same(a, b) for a, b in pairs)


def _complement(slices: Sequence[WeightSlice], stored: StoredTensor) -> WeightSlice | None:
    """Return the rows of a tensor that are in none of several slices; None if there are none."""
    if not slices:
        return WeightSlice(stored.name, stored.shape)
    spans = sorted(span for own in slices for span in own.spans)
    edges = [0, *(edge for span in spans for edge in span), slices[0].total]
    rest = tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b)
    return slices[0].at(rest) if rest else None


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same(tensor: Tensor, base: Tensor) -> bool:
    """Return whether two tensors have the same bits, piece by piece; the second is widened to the first one's type."""
    if not tensor.dim():
        tensor, base = tensor.reshape(1), base.reshape(1)
    rows = max(1, _CHUNK * len(tensor) // max(1, tensor.numel()))
    for own, other in zip(torch.split(tensor, rows), torch.split(base, rows), strict=True):
        bits = _BITS[tensor.dtype.itemsize]
        if not torch.equal(own.view(bits), other.to(tensor.dtype).view(bits)):
            return False
    return True
