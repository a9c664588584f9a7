"""DoRA: trained magnitudes for a weight's rows, and a low-rank update of their directions (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.effective_weight import EffectiveWeight, effective_weight, trace
from graftc.passes.core.method.capabilities import Exchangeable, RowWise
from graftc.passes.core.method.lowrank import added, factors, normal, uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.ops.magnitude import SMALLEST, TINY, norm_of_squares, squares
from graftc.passes.core.sites.sites import EmbeddingSite, LinearSite, SiteKey
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.passes.methods.bases.low_rank import dropped_input, kept
from graftc.specs.methods.dora import DoRA

aten = torch.ops.aten
ops = torch.ops.graftc

Scales = dict[SiteKey, fx.Node]


class DoRAMethod(Method[DoRA, LinearSite], RowWise[DoRA], Exchangeable[DoRA]):
    """``y = c * (u + s B A x) + b`` with ``c = m / |W + s B A|`` and ``u = W x`` (arXiv:2402.09353).

    ``m: [rows]`` is initialised to the row norms of ``W``; their squares are stored as a constant. The norms in ``c``
    are computed from that constant with the same arithmetic, so ``c`` is initially exactly one. To preserve the bias,
    the graph computes ``y = c * (u + b) + s (c * B) A x + (1 - c) * b``, which initially equals ``u + b`` bit for bit.

    With dropout on the input, the second product is ``W (x - x~)``, which replaces part of the bias term: ``(1 - c) *
    (b + W (x - x~))``.

    On top of other adaptations, ``W`` and ``b`` are the base's weight and bias with those adaptations folded in, and
    the norm is computed from the matrix itself.
    """

    def prepare(self, spec: DoRA, sites: Sequence[LinearSite], build: Builder) -> Scales:
        """Return an empty table of scales by place; all uses of a place share its scale."""
        return {}

    def insert(self, spec: DoRA, site: LinearSite, shared: Scales, build: Builder) -> None:
        """Add the update to the site's result and rescale it.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)`` without ``excess_rank``, GC017 if another
                adaptation at the site cannot be expressed as a change to the weights.
        """
        base = effective_weight(build, site)
        pair = _factors(spec, site, build) if spec.direction else ()
        scale = _scale(spec, site, base, pair, shared, build)
        delta = lost = None
        # float16 cannot represent the value that replaces a scale of zero.
        whole = base.offset is None and build.output(site).meta["val"].dtype != torch.float16
        if pair:
            x = build.input(site)
            dropped = dropped_input(spec, x, build)
            if dropped is not x and spec.dropout_on == "input":
                weight = build.cast(base.weight, x.meta["val"].dtype)
                lost = build.map(site, build.call(aten.sub.Tensor, x, dropped, part="lost"), weight, part="lost")
            whole = whole and lost is None
            delta = build.low_rank(site, dropped, pair[0], _scaled_up(build, pair[1], scale, whole), spec.scaling)
        rows = build.per_row(site, scale)
        own = (build.output(site), rows, delta, base.offset, lost, whole)
        build.set_output(site, build.call(ops.rescale.default, *own, part="rescale"))

    def fold(self, spec: DoRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the magnitudes and the update into the weight: ``W' = m * V / |V|`` with ``V = W + s B A``."""

        def change(weight: Tensor) -> Tensor:
            if "A" in tensors:
                weight = added(weight, tensors["B"], tensors["A"], spec.scaling)
            norm = _direct_norm(weight)
            norm = norm.detach() if spec.norm_gradient == "detached" else norm
            return weight * (tensors["m"] / norm)[..., None]

        return weight_fold(change)

    def exchangeable(self, spec: DoRA, size: int) -> DoRA:
        """Return the adaptation with factors of this rank at every site, whose scale is 1."""
        return DoRA(rank=size, alpha=size, excess_rank=True, **kept(spec, "name", "target", "dtype"))

    def exchanged(self, spec: DoRA, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors with the scale in ``B``."""
        return {part: tensor * spec.scaling if part == "B" else tensor for part, tensor in tensors.items()}

    def row_axes(self, spec: DoRA) -> Mapping[str, int]:
        """Return the row axes of ``B`` and ``m``."""
        return {"B": -2, "m": -1}

    def fewest_rows(self, spec: DoRA) -> int:
        """Return the minimum number of rows: the rank, or 1 if the spec accepts an excess rank or has no update."""
        return spec.rank if spec.direction and not spec.excess_rank else 1

    def from_weight(self, spec: DoRA, weight: Tensor) -> Mapping[str, Tensor]:
        """Return the squared norms of the weight's rows, which the graph reads as a constant."""
        return {"square": squares(weight)}


def _factors(spec: DoRA, site: LinearSite, build: Builder) -> tuple[fx.Node, fx.Node]:
    if isinstance(site, EmbeddingSite):
        return factors(build, site, spec.rank, zeros, normal(1), excess_rank=spec.excess_rank)
    down = normal(1 / spec.rank) if spec.init == "gaussian" else uniform
    return factors(build, site, spec.rank, down, zeros, excess_rank=spec.excess_rank)


def _scaled_up(build: Builder, b: fx.Node, scale: fx.Node, whole: bool) -> fx.Node:
    """Return ``c * B``; ``B`` is the smallest tensor to which ``c`` can be applied.

    If ``whole`` is true, `rescale` computes the gradient of ``c`` from its own result, so here ``c`` is treated as a
    constant, with zeros replaced by `TINY`.
    """
    factor = scale
    if whole:
        factor = build.call(aten.detach.default, scale, part="scaled up")
        vanishes = build.call(aten.eq.Scalar, factor, 0, part="scaled up")
        factor = build.call(aten.where.ScalarSelf, vanishes, TINY, factor, part="scaled up")
    column = build.call(aten.unsqueeze.default, factor, -1, part="scaled up")
    return build.cast(build.call(aten.mul.Tensor, b, column, part="scaled up"), b.meta["val"].dtype)


def _scale(
    spec: DoRA, site: LinearSite, base: EffectiveWeight, pair: Sequence[fx.Node], shared: Scales, build: Builder
) -> fx.Node:
    """Return the node that computes ``m / |V|``, ``[..., rows]``; all uses of a place share it."""
    square = build.constant("square", lambda: squares(base.value())) if base.fixed else None
    magnitude = build.trained("m", lambda: _first_norm(spec, base, square, pair, build))
    if site.key.place not in shared:
        norm = _norm(spec, base, square, pair, build)
        shared[site.key.place] = build.call(aten.div.Tensor, magnitude, norm, part="scale")
    return shared[site.key.place]


def _first_norm(
    spec: DoRA, base: EffectiveWeight, square: fx.Node | None, pair: Sequence[fx.Node], build: Builder
) -> Tensor:
    """Return the value that `_norm` computes before training, using the same arithmetic.

    Adding a product that is zero does not change a single bit of a square.
    """
    if square is not None:
        return norm_of_squares(build.current_value(square))
    values = [build.current_value(node) for node in pair]
    return _norm_with_update(base.value(), *values, scaling=spec.scaling)[0]


def _norm(
    spec: DoRA, base: EffectiveWeight, square: fx.Node | None, pair: Sequence[fx.Node], build: Builder
) -> fx.Node:
    """Return the node that computes ``|W + s B A|``."""
    weight = base.weight
    if spec.norm_gradient == "detached":
        pair = [build.call(aten.detach.default, node, part="norm") for node in pair]
        weight = weight if square is not None else build.call(aten.detach.default, weight, part="norm")
    if square is None:
        return trace(build, partial(_norm_with_update, scaling=spec.scaling), [weight, *pair], "norm")[0]
    if not pair:
        return trace(build, lambda held: [norm_of_squares(held)], [square], "norm")[0]
    return build.call(ops.row_norm.default, square, weight, *pair, spec.scaling, part="norm")


def _norm_with_update(weight: Tensor, *pair: Tensor, scaling: float) -> list[Tensor]:
    # `torch.promote_types` would become a node of the graph.
    wide = weight.dtype if weight.dtype.itemsize > 4 else torch.float32
    total = weight.to(wide)
    if pair:
        a, b = (factor.to(wide) for factor in pair)
        total = total + scaling * (b @ a)
    # The strides determine the order of summation, and the initial norms must equal the graph's bit for bit.
    return [_direct_norm(total.contiguous())]


def _direct_norm(weight: Tensor) -> Tensor:
    return weight.square().sum(-1).clamp_min(SMALLEST).sqrt()
