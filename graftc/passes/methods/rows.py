"""Direct training of rows: named rows, n of every m rows, or blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import EmbeddingSite, LinearSite
from graftc.passes.core.weights.folds import Fold, StandIn
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.bases.sparse import share
from graftc.specs.methods.rows import RowSelection
from graftc.specs.patterns import parse_slice

Scores = Callable[[int], Tensor]
"""Function from a block size in rows to a score for each block: ``float64[blocks]``, on the CPU."""
Chosen = dict[tuple[int, WeightSlice], tuple[fx.Node | None, Tensor]]
"""Maps the row axis, and the slice that rows were chosen from, to the node of the chosen rows' indices (if the graph
reads one) and the indices."""

_BLOCK = 2**22
"""How many elements of a weight are converted to float64 at a time."""


class RowsMethod(Method[RowSelection, LinearSite]):
    """Trains a copy of ``W[r]`` for the selected rows ``r``: ``[rows, in]``, in the layout of the base's weight.

    The rows of a linear map are its output features, those of a table its entries, and those of experts the output
    features of each expert. Sites that read the same weight, such as a table and the head tied to it, share one
    selection and one copy.
    """

    stands_in = True

    def prepare(self, spec: RowSelection, sites: Sequence[LinearSite], build: Builder) -> Chosen:
        """Return an empty table of choices; all uses of a weight share its choice."""
        return {}

    def insert(self, spec: RowSelection, site: LinearSite, shared: Chosen, build: Builder) -> None:
        """Replace the base's rows with trained ones.

        Raises:
            GraftError: GC020 for a row that the site does not have, GC021 if another adaptation also trains one of
                them.
        """
        own = build.every(site.own.tensor) if isinstance(site, EmbeddingSite) else site.own
        key = own.axis, own.as_stored
        if key not in shared:
            shared[key] = self._chosen(spec, site, own, build)
        index, numbers = shared[key]
        rows = own.picked(numbers)
        build.overlay(rows, index)
        if spec.bias and site.use.bias is not None:
            build.overlay(rows.companion(site.use.bias.tensor), index)

    def fold(self, spec: RowSelection, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Replace the base's rows with the trained ones."""
        return StandIn()

    def _chosen(
        self, spec: RowSelection, site: LinearSite, own: WeightSlice, build: Builder
    ) -> tuple[fx.Node | None, Tensor]:
        """Return the node of the chosen rows' indices, if the graph reads one, and the indices in order."""
        every = own.index()
        if spec.rows is not None:
            return None, every[named_rows(spec.rows, own.count, str(site.key))]

        def settle(generator: torch.Generator) -> Tensor:
            return every[chosen_rows(spec, own.count, _scores(spec, site, own.count, build, generator))]

        # Layers with different rows can share code that reads the indices from a tensor with the same name.
        return build.settled("chosen", settle)


def named_rows(entries: Sequence[int | str], count: int, place: str) -> Tensor:
    """Return the indices of the rows named by a list of indices and slices, ascending and without duplicates.

    Args:
        entries: the indices and slices of a spec.
        count: number of rows.
        place: the place to name in errors.

    Raises:
        GraftError: GC020 for an index out of range, and for a slice that selects no rows.
    """
    numbers: set[int] = set()
    for index, entry in enumerate(entries):
        parsed = parse_slice(entry, "row")
        if isinstance(parsed, slice):
            named = range(*parsed.indices(count))
        else:
            named = range(parsed % count, parsed % count + 1) if -count <= parsed < count else range(0)
        if not named:
            last = f"rows 0 to {count - 1}" if count > 1 else "row 0 only"
            message = f"{entry!r} is not a row of {place}, which has {last}"
            hint = "correct it, or leave the site out of the target"
            raise GraftError("GC020", message, place=Place(path=f"rows[{index}]"), hint=hint)
        numbers.update(named)
    return torch.tensor(sorted(numbers))


def chosen_rows(spec: RowSelection, count: int, scores: Scores) -> Tensor:
    """Return the indices of the rows selected by ``n_of_m`` or ``density``, ascending: those with the greatest scores.

    Args:
        spec: the spec that determines how many rows are trained.
        count: number of rows.
        scores: a function that returns the scores of single rows, or of blocks of `spec.block`.
    """
    if spec.n_of_m is not None:
        n, m = spec.n_of_m
        padded = torch.full((math.ceil(count / m) * m,), -math.inf, dtype=torch.float64)
        padded[:count] = scores(1)
        groups = padded.view(-1, m).argsort(dim=1, descending=True, stable=True)[:, :n]
        numbers = (groups + torch.arange(0, padded.numel(), m)[:, None]).flatten()
        return numbers[numbers < count].sort().values
    assert spec.density is not None
    wanted = max(1, share(spec.density, math.ceil(count / spec.block)))
    best = scores(spec.block).argsort(descending=True, stable=True)[:wanted].sort().values
    numbers = (best[:, None] * spec.block + torch.arange(spec.block)).flatten()
    return numbers[numbers < count]


def _scores(spec: RowSelection, site: LinearSite, count: int, build: Builder, generator: torch.Generator) -> Scores:
    weight = build.read_weight(site)
    if isinstance(site, EmbeddingSite):
        weight = weight.transpose(-1, -2)
    if weight.is_meta:
        return lambda size: torch.zeros(math.ceil(count / size), dtype=torch.float64)
    if spec.selection == "random":
        return lambda size: torch.rand(math.ceil(count / size), dtype=torch.float64, generator=generator)
    return lambda size: _means(row_squares(weight), size)


def row_squares(weight: Tensor) -> Tensor:
    """Return the sum of squares of each row of ``[..., rows, in]``, over all experts: ``float64[rows]``, on the CPU.

    Equal rows have equal sums.
    """
    rows = weight.shape[-2]
    size = max(1, _BLOCK // max(1, weight.numel() // rows))
    parts = [part.double().contiguous().square().sum(-1) for part in torch.split(weight, size, -2)]
    return torch.cat(parts, -1).reshape(-1, rows).sum(0).cpu()


def _means(values: Tensor, size: int) -> Tensor:
    """Return the means over blocks of ``size`` consecutive values; the last block may be shorter."""
    blocks = math.ceil(values.numel() / size)
    padded = values.new_zeros(blocks * size)
    padded[: values.numel()] = values
    counts = torch.full((blocks,), size, dtype=torch.float64)
    counts[-1] = values.numel() - (blocks - 1) * size
    return padded.view(blocks, size).sum(1) / counts
