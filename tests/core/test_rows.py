"""Rows of a fused tensor, taken and put back in tensors and in graphs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graftc.passes.core.rows import MAX_SLICES, Rows


@st.composite
def rows(draw: st.DrawFn, total: int | None = None) -> Rows:
    """Some rows, in runs that may touch."""
    size = total if total is not None else draw(st.integers(1, 24))
    cuts = sorted(draw(st.sets(st.integers(0, size), min_size=2, max_size=14)))
    pairs = list(pairwise(cuts))
    own = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)).filter(any))
    return Rows(size, tuple(pair for pair, mine in zip(pairs, own, strict=True) if mine))


def numbers(found: Rows) -> list[int]:
    """The row numbers, spelled out."""
    return [row for start, end in found.spans for row in range(start, end)]


def emit(target: Any, *args: Any) -> Any:
    """Compute at once what a graph would hold as a node."""
    return target(*args)


@settings(max_examples=150, deadline=None)
@given(rows(), st.integers(0, 2**31))
def test_take_and_put(own: Rows, seed: int) -> None:
    """`take` and `put` do what indexing does; the tensor given is left alone."""
    generator = torch.Generator().manual_seed(seed)
    tensor, new = torch.randn(own.total, 3, generator=generator), torch.randn(own.count, 3, generator=generator)
    before = tensor.clone()
    index = numbers(own)
    assert own.count == len(index)
    assert own.index().tolist() == index
    assert torch.equal(own.take(tensor), tensor[index])
    expected = tensor.clone()
    expected[index] = new
    assert torch.equal(own.put(tensor, new), expected)
    assert torch.equal(own.put(tensor, own.take(tensor)), tensor)
    assert torch.equal(tensor, before)


@settings(max_examples=150, deadline=None)
@given(rows(), st.sampled_from([0, 1, -1]))
def test_read_and_write_agree(own: Rows, dim: int) -> None:
    """In a graph `read` is `take` and `write` is `put`, along any axis, by slices or by an index."""
    shape = [4, 4]
    shape[dim] = own.total
    tensor: Tensor = torch.arange(4.0 * own.total).reshape(shape)
    shape[dim] = own.count
    new = -1 - torch.arange(4.0 * own.count).reshape(shape)
    read: Any = own.read(emit, tensor, dim, own.index)
    assert torch.equal(read, own.take(tensor.movedim(dim, 0)).movedim(0, dim))
    written: Any = own.write(emit, tensor, new, dim, own.index)
    assert torch.equal(written, own.put(tensor.movedim(dim, 0), new.movedim(dim, 0)).movedim(0, dim))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_overlaps(data: st.DataObject) -> None:
    """Two sets of rows overlap where they share a row."""
    total = data.draw(st.integers(1, 16))
    a, b = data.draw(rows(total)), data.draw(rows(total))
    assert a.overlaps(b) == b.overlaps(a) == bool(set(numbers(a)) & set(numbers(b)))


def test_all_rows() -> None:
    """One run over everything is the whole tensor; nothing is cut then."""
    whole = Rows(6, ((0, 6),))
    assert whole == Rows(6)
    assert whole.whole
    assert str(whole) == "all"
    tensor = torch.randn(6, 2)
    assert whole.take(tensor) is tensor
    assert whole.read(emit, tensor, 0, whole.index) is tensor  # type: ignore[arg-type, comparison-overlap]
    assert not Rows(6, ((0, 3),)).whole
    assert str(Rows(6, ((0, 2), (4, 6)))) == "0:2,4:6"


def test_many_runs_use_an_index() -> None:
    """Few runs are slices, many are one index: the constant is asked for only then."""
    asked: list[int] = []

    def index(own: Rows) -> Any:
        asked.append(own.count)
        return own.index()

    for runs in (MAX_SLICES, MAX_SLICES + 1):
        own = Rows(20, tuple((2 * i, 2 * i + 1) for i in range(runs)))
        own.read(emit, torch.randn(20), 0, lambda own=own: index(own))  # type: ignore[arg-type, misc]
    assert asked == [MAX_SLICES + 1]
