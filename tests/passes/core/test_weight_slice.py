"""Slices of stored weights compared with index arithmetic on dense tensors."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftc.passes.core.weights.runs import MAX_SLICES
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice

SETTINGS = settings(max_examples=150, deadline=None)
RANKS = {Layout.ROWS: (2, 3), Layout.COLUMNS: (2, 3), Layout.KERNEL: (3, 5), Layout.PLAIN: (1, 3)}
"""How few and how many axes a tensor of a layout has here: matrices, experts, convolutions, vectors."""


@st.composite
def runs(draw: st.DrawFn, total: int) -> tuple[tuple[int, int], ...]:
    """Draw some rows, at least one, in runs that may touch."""
    cuts = sorted(draw(st.sets(st.integers(0, total), min_size=2, max_size=14)))
    pairs = list(pairwise(cuts))
    own = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)).filter(any))
    return tuple(pair for pair, mine in zip(pairs, own, strict=True) if mine)


@st.composite
def slices(draw: st.DrawFn, shape: tuple[int, ...] | None = None, layout: Layout | None = None) -> WeightSlice:
    """Draw some rows of a weight, of a given shape if there is one, in any layout that fits."""
    if layout is None:
        fit = [known for known in Layout if shape is None or RANKS[known][0] <= len(shape) <= RANKS[known][1]]
        layout = draw(st.sampled_from(fit))
    if shape is None:
        sizes = st.lists(st.integers(1, 12), min_size=RANKS[layout][0], max_size=RANKS[layout][1])
        shape = tuple(draw(sizes.filter(lambda sizes_drawn: torch.Size(sizes_drawn).numel() <= 800)))
    every = WeightSlice("map.weight", shape, layout)
    return every.at(draw(st.none() | runs(every.total)))


def rows_of(own: WeightSlice) -> list[int]:
    """List the row numbers."""
    return [row for start, end in own.spans for row in range(start, end)]


def dense(own: WeightSlice, stored: Tensor) -> Tensor:
    """Return all of a weight as ``[..., rows, in]``, spelled out; a tensor that is not a matrix stays unchanged."""
    if own.layout is Layout.COLUMNS:
        return torch.stack([stored[..., row] for row in range(stored.shape[-1])], -2)
    if own.layout is Layout.KERNEL:
        return torch.stack([kernel.reshape(-1) for kernel in stored])
    return stored


def dense_rows(own: WeightSlice, stored: Tensor) -> Tensor:
    """Return the slice's own rows of the dense weight."""
    every = dense(own, stored)
    return every[rows_of(own)] if own.layout is Layout.PLAIN else every[..., rows_of(own), :]


def numbered(own: WeightSlice) -> Tensor:
    """Return a stored tensor that contains the numbers of its entries."""
    return torch.arange(own.numel).view(own.shape)


def entries_of(own: WeightSlice) -> set[int]:
    """Return the numbers of the slice's own entries in the stored tensor, found through the matrix."""
    return set(dense_rows(own, numbered(own)).flatten().tolist())


def emit(target: Any, *args: Any, part: str = "") -> Any:
    """Compute at once what would be a node in a graph."""
    return target(*args)


def on_values(own: WeightSlice) -> Any:
    """Return the slice, typed to take values instead of nodes."""
    return own


@pytest.mark.slow
@SETTINGS
@given(slices(), st.integers(0, 2**31))
def test_parts_as_they_are_stored(own: WeightSlice, seed: int) -> None:
    """`take` and `put` do what indexing does, and leave the given tensor unchanged."""
    generator = torch.Generator().manual_seed(seed)
    stored, new = (torch.randn(shape, generator=generator) for shape in (own.shape, own.own_shape))
    before, index = stored.clone(), rows_of(own)
    assert (own.count, own.index().tolist()) == (len(index), index)
    expected = stored.movedim(own.axis, 0)[index].movedim(0, own.axis)
    assert torch.equal(own.take(stored), expected)
    assert own.size == expected.numel() == len(entries_of(own))
    assert set(own.take(numbered(own)).flatten().tolist()) == entries_of(own)
    changed = stored.clone()
    changed.movedim(own.axis, 0)[index] = new.movedim(own.axis, 0)
    assert torch.equal(own.put(stored, new), changed)
    assert torch.equal(own.put(stored, own.take(stored)), stored)
    assert torch.equal(stored, before)


@pytest.mark.slow
@SETTINGS
@given(slices(), st.integers(0, 2**31))
def test_operands(own: WeightSlice, seed: int) -> None:
    """An operand is the slice's own rows of the matrix, and can be put back in place."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(own.shape, generator=generator)
    before, operand = stored.clone(), own.operand(stored)
    assert torch.equal(operand, dense_rows(own, stored))
    assert torch.equal(operand, own.oriented(own.take(stored)))
    assert torch.equal(own.restored(operand), own.take(stored))
    if own.layout is not Layout.PLAIN:
        assert operand.shape == (*own.leading, own.count, own.in_features)
    new = torch.randn(operand.shape, generator=generator)
    changed = own.put_operand(None if own.whole else stored, new)
    assert changed.shape == stored.shape
    assert torch.equal(dense_rows(own, changed), new)
    others = torch.tensor(sorted(set(range(own.numel)) - entries_of(own)), dtype=torch.int64)
    assert torch.equal(changed.flatten()[others], stored.flatten()[others])
    assert torch.equal(stored, before)


@pytest.mark.slow
@SETTINGS
@given(slices())
def test_nodes_are_what_values_are(own: WeightSlice) -> None:
    """In a graph, `read` is `take`, `write` is `put` and `read_operand` is `operand`, by slices or by an index."""
    stored = numbered(own)
    part = -1 - own.take(stored)
    assert torch.equal(on_values(own).read(emit, stored, own.index), own.take(stored))
    assert torch.equal(on_values(own).write(emit, stored, part, own.index), own.put(stored, part))
    operand = on_values(own).read_operand(emit, stored, own.index)
    assert torch.equal(operand, own.operand(stored))
    if own.layout is not Layout.KERNEL:
        assert torch.equal(on_values(own).restore(emit, operand, "part"), own.take(stored))


@pytest.mark.full
@SETTINGS
@given(slices(), st.sampled_from([0, 1, -1]))
def test_nodes_that_have_the_rows_on_another_axis(own: WeightSlice, axis: int) -> None:
    """The result of a map has a column for each row, on any axis."""
    value = torch.arange(own.total * 16).view(own.total, 4, 4).movedim(0, axis)
    index = rows_of(own)
    columns = on_values(own).read(emit, value, own.index, axis)
    assert torch.equal(columns, value.movedim(axis, 0)[index].movedim(0, axis))
    written = on_values(own).write(emit, value, -1 - columns, own.index, axis)
    assert torch.equal(on_values(own).read(emit, written, own.index, axis), -1 - columns)
    untouched = torch.ones(own.total, dtype=torch.bool)
    untouched[index] = False
    assert torch.equal(written.movedim(axis, 0)[untouched], value.movedim(axis, 0)[untouched])


@pytest.mark.full
@SETTINGS
@given(st.data())
def test_slices_of_one_tensor(data: st.DataObject) -> None:
    """Slices overlap if they share an entry, along any axes, and one covers another that has no other entries."""
    a = data.draw(slices())
    b = data.draw(slices(a.shape))
    mine, others = entries_of(a), entries_of(b)
    assert a.overlaps(b) == b.overlaps(a) == bool(mine & others)
    assert a.overlaps(a) and a.covers(a)
    assert a.covers(b) == (others <= mine)
    if a.covers(b):
        inner = b.within(a)
        assert torch.equal(inner.take(a.take(numbered(a))), b.take(numbered(b)))
        assert inner.shape == a.own_shape
    elsewhere = WeightSlice("other.weight", b.shape, b.layout, b.rows)
    assert not (a.overlaps(elsewhere) or a.covers(elsewhere))


@pytest.mark.full
@SETTINGS
@given(st.data())
def test_rows_within_rows(data: st.DataObject) -> None:
    """Rows of rows, in one layout, are found at their positions among the outer rows."""
    outer = data.draw(slices())
    numbers = rows_of(outer)
    chosen = sorted(data.draw(st.sets(st.sampled_from(numbers), min_size=1)))
    inner = outer.picked(torch.tensor(chosen))
    assert rows_of(inner) == chosen and outer.covers(inner)
    assert rows_of(inner.within(outer)) == [numbers.index(row) for row in chosen]
    assert inner.within(outer).total == outer.count


@pytest.mark.full
@SETTINGS
@given(slices())
def test_the_same_entries_have_one_form(own: WeightSlice) -> None:
    """However a reader sees the tensor, the stored form of a slice is the same."""
    assert entries_of(own.as_stored) == entries_of(own)
    assert own.as_stored.as_stored == own.as_stored
    assert own.as_stored.own_shape == own.own_shape
    assert str(own.as_stored) == str(own)
    if own.axis == 0:
        assert own.as_stored == WeightSlice(own.tensor, own.shape, Layout.PLAIN, own.rows)
    if own.whole:
        assert own.as_stored == WeightSlice.every(own.tensor, torch.empty(own.shape))


@pytest.mark.full
@SETTINGS
@given(slices(), st.data())
def test_entries_by_number(own: WeightSlice, data: st.DataObject) -> None:
    """Own entries are numbered in stored order, and `places` and `numbers` are inverse to each other."""
    stored = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    every = torch.tensor(sorted(entries_of(own)))
    assert torch.equal(own.entries(stored), stored.flatten()[every])
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, own.size - 1), unique=True)), dtype=torch.int64)
    places = own.places(chosen)
    assert places.dtype == torch.int32
    assert torch.equal(places.long(), every[chosen])
    assert torch.equal(own.numbers(places), chosen)
    assert torch.equal(own.mask().expand(own.shape).flatten().nonzero().flatten(), every)


@pytest.mark.slow
@SETTINGS
@given(slices())
def test_companions(own: WeightSlice) -> None:
    """A bias has one entry for each row."""
    bias = own.companion("map.bias")
    stored = torch.arange(own.total)
    assert (bias.tensor, bias.own_shape, bias.part) == ("map.bias", (own.count,), "bias")
    assert bias.take(stored).tolist() == rows_of(own) == bias.operand(stored).tolist()
    assert not bias.overlaps(own)


def test_all_rows() -> None:
    """Runs over all rows are the whole tensor, and nothing is sliced then."""
    whole = WeightSlice("map.weight", (6, 2), Layout.ROWS, ((0, 4), (4, 6)))
    assert whole == WeightSlice("map.weight", (6, 2), Layout.ROWS)
    assert whole.whole and whole.rows is None
    assert str(whole) == "all"
    tensor = torch.randn(6, 2)
    assert whole.take(tensor) is tensor
    assert on_values(whole).read(emit, tensor, whole.index) is tensor
    some = whole.at(((0, 2), (4, 6)))
    assert not some.whole
    assert str(some) == "rows 0:2,4:6"
    assert some.at(None) == whole
    assert some.at(((1, 3), (3, 5))).rows == ((1, 5),)


def test_operands_of_all_rows_are_views() -> None:
    """Viewing a tensor as a matrix copies nothing."""
    for layout, shape in ((Layout.COLUMNS, (3, 4)), (Layout.ROWS, (3, 4)), (Layout.KERNEL, (3, 4, 5))):
        stored = torch.randn(shape)
        assert WeightSlice("w", shape, layout).operand(stored).data_ptr() == stored.data_ptr()


def test_a_number_alone() -> None:
    """A tensor without axes is one row."""
    own = WeightSlice.every("scale", torch.tensor(2.0))
    assert (own.total, own.count, own.size, own.own_shape) == (1, 1, 1, ())
    assert own.whole and own.overlaps(own) and own.entries(torch.tensor(2.0)).tolist() == [2.0]
    assert own.places(torch.tensor([0])).tolist() == [0]


def test_no_rows() -> None:
    """A slice without rows overlaps nothing and is covered by everything."""
    none = WeightSlice("map.weight", (4, 3), Layout.ROWS, ())
    whole = none.at(None)
    assert (none.count, none.size, none.index().tolist()) == (0, 0, [])
    assert not none.overlaps(whole) and not whole.overlaps(none) and whole.covers(none)
    assert none.take(torch.randn(4, 3)).shape == (0, 3)


@pytest.mark.parametrize("rows", [((2, 5),), ((3, 4), (1, 2)), ((-1, 2),), ((2, 1),)])
def test_runs_that_are_none(rows: tuple[tuple[int, int], ...]) -> None:
    """Runs have to be ascending and within the rows."""
    with pytest.raises(ValueError, match=r"map\.weight"):
        WeightSlice("map.weight", (4, 3), Layout.ROWS, rows)


def test_many_runs_use_an_index() -> None:
    """Few runs become slices and many become one index, whose constant is requested only then."""
    asked: list[int] = []

    def index(own: WeightSlice) -> Any:
        asked.append(own.count)
        return own.index()

    for count in (MAX_SLICES, MAX_SLICES + 1):
        own = WeightSlice("map.bias", (20,), rows=tuple((2 * i, 2 * i + 1) for i in range(count)))
        on_values(own).read(emit, torch.randn(20), partial(index, own))
    assert asked == [MAX_SLICES + 1]
