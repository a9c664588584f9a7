"""Rotations of a linear map's input, block by block, in one factor or in several."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.effective_weight import effective_weight, trace
from graftc.passes.core.method.capabilities import Exchangeable, RowWise
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.bases.rotation import RotationSpec

aten = torch.ops.aten
ops = torch.ops.graftc
S = TypeVar("S", bound=RotationSpec)


class RotationMethod(Method[S, LinearSite], RowWise[S], Exchangeable[S]):
    """``y = s * (W (x R)) + b`` with ``R = ... R_1 R_0``; without ``s`` where a method does not have it.

    A factor acts as ``x + x T`` with ``T = R - I``. Since ``T`` is exactly zero at first, no bit of ``x`` changes then,
    and in 16 bits a small rotation is not lost, as it would be in ``R``. The sum becomes the input of the site and of
    everything inserted there so far, which is the same as rotating the effective weight. Where the input is not a
    vector of ``in`` entries, the change of the weight is applied next to the weight.
    """

    @abstractmethod
    def turns(self, spec: S, q: Tensor, size: int) -> list[Tensor]:
        """Return ``T`` of every factor, ``R_0`` first, as blocks, ``[..., blocks, size, size]``.

        Args:
            spec: the adaptation with the site's overrides applied.
            q: the site's parameter ``Q``, of at least 32 bits.
            size: the number of entries of a block.
        """

    def blocks(self, spec: S, site: LinearSite) -> tuple[int, int]:
        """Return the number of blocks at a site, and their size.

        Raises:
            GraftError: GC020 if the spec's number does not divide the input, or leaves blocks of one entry.
        """
        wanted, width, nearest = spec.blocks or spec.block_size, site.in_features, self.nearest(spec)
        number = _nearest(_divisors(width), wanted) if nearest else wanted
        size = width // number if spec.blocks else number
        if width % number or size < 2:
            usable = [n for n in _divisors(width) if (width // n if spec.blocks else n) > 1] or [1]
            otherwise = ", set nearest" if nearest is False else ""
            raise unfit(spec, site, f"use {_nearest(usable, wanted)} for example{otherwise}")
        return width // size, size

    def nearest(self, spec: S) -> bool | None:
        """Return whether a site uses the divisor nearest to the spec's number; None if specs have no such choice."""
        return None

    def rotate(self, spec: S, site: LinearSite, build: Builder, q: fx.Node, scale: fx.Node | None = None) -> None:
        """Rotate the site's input, or add the change of the weight.

        Args:
            spec, site, build: as for `insert`.
            q: the node of the parameter ``Q``.
            scale: the node of the parameter ``s``, ``[..., out]``.

        Raises:
            GraftError: GC020 if the blocks do not fit the input, and GC017 if the effective weight is needed, but an
                adaptation at the site cannot be expressed as a change to the weights.
        """
        _, size = self.blocks(spec, site)
        turns = trace(build, lambda q: self.turns(spec, q, size), [q], "turn")
        x = build.input(site)
        if site.use.input_axis != -1 or site.leading:
            sources = [effective_weight(build, site).weight, *turns, *([scale] if scale is not None else [])]
            (delta,) = trace(build, lambda *values: [_delta(*values, scaled=scale is not None)], sources, "delta")
            build.add(site, build.map(site, x, build.cast(delta, x.meta["val"].dtype)))
            return
        rotated = x
        for number, turn in reversed(list(enumerate(turns))):
            rotated = _rotated(build, rotated, build.cast(turn, x.meta["val"].dtype), 2**number)
        build.set_input(site, rotated)
        if scale is not None:
            offset = effective_weight(build, site).offset
            own = (build.output(site), build.per_row(site, scale), None, offset, None, False)
            build.set_output(site, build.call(ops.rescale.default, *own, part="scale"))

    def fold(self, spec: S, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the rotation, and the scale where there is one, into the weight: ``W' = diag(s) W R^T``."""
        size = self.blocks(spec, site)[1]

        def change(weight: Tensor) -> Tensor:
            weight = weight + _change(weight, self.turns(spec, tensors["Q"], size))
            return weight * tensors["s"][..., None] if "s" in tensors else weight

        return weight_fold(change)

    def repeats(self, spec: S) -> bool:
        """Return True, since the insertion depends only on the spec and the types of the site's tensors."""
        return True

    def exchangeable(self, spec: S, size: int) -> S:
        """Return the spec, since the blocks have the sizes of the base."""
        return spec

    def row_axes(self, spec: S) -> Mapping[str, int]:
        """Return the row axis of ``s``; every row is rotated by all of ``Q``."""
        return {"s": -1}


def unfit(spec: RotationSpec, site: LinearSite, hint: str) -> GraftError:
    """Return the error (GC020) for blocks that do not fit a site; the hint is a way out of it."""
    field, width = "blocks" if spec.blocks else "block_size", site.in_features
    wanted = getattr(spec, field)
    message = f"{field} {wanted} does not divide the {width} inputs of {site.key}"
    if not width % wanted:
        message = f"{field} {wanted} does not fit {site.key}, which has {width} inputs"
    return GraftError("GC020", message, place=Place(path=field), hint=f"{hint}, or leave the site out with exclude")


def cayley(skew: Tensor) -> Tensor:
    """Return ``T`` of the rotations ``(I - Q) (I + Q)^-1`` of skew-symmetric matrices, ``[..., size, size]``."""
    product: Tensor = skew @ ops.inverse_beside_one(skew)
    return -2 * product


def _divisors(width: int) -> list[int]:
    return [number for number in range(1, width + 1) if width % number == 0]


def _nearest(numbers: Iterable[int], wanted: int) -> int:
    """Return the number that is nearest to the wanted one; the smaller of two."""
    return min(numbers, key=lambda number: (abs(number - wanted), number))


def _runs(width: int, size: int, apart: int) -> tuple[list[int], list[int]]:
    """Return the sizes of an axis of blocks, each of two runs of entries that begin ``apart`` runs apart.

    First the sizes of the axis as it is; swapping the second and third makes every block contiguous, with the other
    sizes.
    """
    count, run = width // (apart * size), size // 2
    return [count, 2, apart, run], [count, apart, 2, run]


def _rotated(build: Builder, x: fx.Node, turn: fx.Node, apart: int) -> fx.Node:
    """Return ``x + x T`` for one factor."""
    size, width = int(turn.meta["val"].shape[-1]), int(x.meta["val"].shape[-1])
    apart_sizes, together_sizes = _runs(width, size, apart)
    with_rows = turn.meta["val"].dim() > 3
    for _ in range(x.meta["val"].dim() - 2 if with_rows else 0):
        turn = build.call(aten.unsqueeze.default, turn, 1, part="rows")
    equation = "...rc,...rck->...rk" if with_rows else "...rc,rck->...rk"
    value = _swapped(build, x, apart_sizes)
    value = build.call(aten.unflatten.int, value, -1, [width // size, size], part="blocks")
    value = build.call(aten.einsum.default, equation, [value, turn], part="moved")
    value = build.call(aten.flatten.using_ints, value, -2, part="moved")
    value = _swapped(build, value, together_sizes)
    return build.call(aten.add.Tensor, x, value, part="rotate")


def _swapped(build: Builder, value: fx.Node, sizes: Sequence[int]) -> fx.Node:
    if 1 in sizes[1:3]:
        return value
    value = build.call(aten.unflatten.int, value, -1, list(sizes), part="runs")
    value = build.call(aten.transpose.int, value, -3, -2, part="runs")
    return build.call(aten.flatten.using_ints, value, -4, part="runs")


def _moved(weight: Tensor, turn: Tensor, apart: int) -> Tensor:
    """Return ``W T^T`` for one factor."""
    *rows, width = weight.shape
    size = turn.shape[-1]
    apart_sizes, together_sizes = _runs(width, size, apart)
    if apart > 1:
        weight = weight.view(*rows, *apart_sizes).transpose(-3, -2).reshape(*rows, width)
    moved = torch.einsum("...orc,...rkc->...ork", weight.view(*rows, width // size, size), turn)
    if apart > 1:
        moved = moved.reshape(*rows, *together_sizes).transpose(-3, -2)
    return moved.reshape(*rows, width)


def _change(weight: Tensor, turns: Sequence[Tensor]) -> Tensor:
    """Return ``W R^T - W``, in the wider of the two dtypes, and exactly zero if every ``T`` is."""
    weight = weight.to(torch.promote_types(weight.dtype, turns[0].dtype))
    total = _moved(weight, turns[0], 1)
    for number, turn in enumerate(turns[1:], 1):
        total = total + _moved(weight + total, turn, 2**number)
    return total


def _delta(weight: Tensor, *factors: Tensor, scaled: bool) -> Tensor:
    """Return ``diag(s) W R^T - W`` for the ``T`` of all factors, after which comes the scale if there is one."""
    change = _change(weight, factors[:-1] if scaled else factors)
    if not scaled:
        return change
    scale = factors[-1][..., None]
    return scale * change + (scale - 1) * weight
