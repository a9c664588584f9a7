"""Rotations of a linear map's input, block by block, in one factor or in several."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
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
        given, width = spec.blocks or spec.block_size, site.in_features
        size = width // given if spec.blocks else given
        if width % given or size < 2:
            raise unfit(spec, site, f"use {fitting(spec, width, given)} for example")
        return width // size, size

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
            (delta,) = trace(build, lambda *given: [_delta(*given, scaled=scale is not None)], sources, "delta")
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
    given = getattr(spec, field)
    message = f"{field} {given} does not divide the {width} inputs of {site.key}"
    if not width % given:
        message = f"{field} {given} does not fit {site.key}, which has {width} inputs"
    return GraftError("GC020", message, place=Place(path=field), hint=f"{hint}, or leave the site out with exclude")


def fitting(spec: RotationSpec, width: int, given: int) -> int:
    """Return the number of blocks, or their size, nearest to a number for which blocks have two entries or more."""
    divisors = [n for n in range(1, width + 1) if width % n == 0 and (width // n if spec.blocks else n) > 1]
    return min(divisors or [1], key=lambda n: (abs(n - given), n))


def nearest_divisor(width: int, given: int) -> int:
    """Return the divisor of ``width`` that is nearest to a number; the smaller of two."""
    return min((n for n in range(1, width + 1) if width % n == 0), key=lambda n: (abs(n - given), n))


def _rotated(build: Builder, x: fx.Node, turn: fx.Node, apart: int) -> fx.Node:
    """Return ``x + x T`` for one factor; see `_moved`."""
    size, width = int(turn.meta["val"].shape[-1]), int(x.meta["val"].shape[-1])
    with_rows = turn.meta["val"].dim() > 3
    for _ in range(x.meta["val"].dim() - 2 if with_rows else 0):
        turn = build.call(aten.unsqueeze.default, turn, 1, part="rows")
    equation = "...rc,...rck->...rk" if with_rows else "...rc,rck->...rk"
    value = _swapped(build, x, [width // (apart * size), 2, apart, size // 2])
    value = build.call(aten.unflatten.int, value, -1, [width // size, size], part="blocks")
    value = build.call(aten.einsum.default, equation, [value, turn], part="moved")
    value = build.call(aten.flatten.using_ints, value, -2, part="moved")
    value = _swapped(build, value, [width // (apart * size), apart, 2, size // 2])
    return build.call(aten.add.Tensor, x, value, part="rotate")


def _swapped(build: Builder, value: fx.Node, sizes: Sequence[int]) -> fx.Node:
    if 1 in sizes[1:3]:
        return value
    value = build.call(aten.unflatten.int, value, -1, list(sizes), part="runs")
    value = build.call(aten.transpose.int, value, -3, -2, part="runs")
    return build.call(aten.flatten.using_ints, value, -4, part="runs")


def _moved(weight: Tensor, turn: Tensor, apart: int) -> Tensor:
    """Return ``W T^T`` for one factor.

    A block consists of two runs of entries that begin ``apart`` runs apart.
    """
    *rows, width = weight.shape
    size = turn.shape[-1]
    if apart > 1:
        runs = weight.view(*rows, width // (apart * size), 2, apart, size // 2)
        weight = runs.transpose(-3, -2).reshape(*rows, width)
    moved = torch.einsum("...orc,...rkc->...ork", weight.view(*rows, width // size, size), turn)
    if apart > 1:
        moved = moved.reshape(*rows, width // (apart * size), apart, 2, size // 2).transpose(-3, -2)
    return moved.reshape(*rows, width)


def _change(weight: Tensor, turns: Sequence[Tensor]) -> Tensor:
    """Return ``W R^T - W``, in the wider of the two dtypes, and exactly zero if every ``T`` is."""
    weight = weight.to(torch.promote_types(weight.dtype, turns[0].dtype))
    total = _moved(weight, turns[0], 1)
    for number, turn in enumerate(turns[1:], 1):
        total = total + _moved(weight + total, turn, 2**number)
    return total


def _delta(weight: Tensor, *given: Tensor, scaled: bool) -> Tensor:
    """Return ``diag(s) W R^T - W``; the scale comes last if there is one."""
    change = _change(weight, given[:-1] if scaled else given)
    if not scaled:
        return change
    scale = given[-1][..., None]
    return scale * change + (scale - 1) * weight
