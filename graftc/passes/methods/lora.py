"""LoRA: a low-rank update beside a frozen linear map (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.build.requantising import REQUANTISED_PARTS
from graftc.passes.core.method.capabilities import Initialised, Transition
from graftc.passes.core.method.lowrank import added, factors, normal, uniform, within, zeros
from graftc.passes.core.method.principal import PrincipalComponents
from graftc.passes.core.method.steering import AdaptedSite
from graftc.passes.core.sites.sites import EmbeddingSite, LinearSite, ParameterSite, SiteKey
from graftc.passes.core.weights.folds import Fold, Keep, weight_fold
from graftc.passes.methods.bases.example_starts import (
    FROM_EXAMPLES,
    check_site,
    from_gradients,
    from_inputs,
    most_components,
)
from graftc.passes.methods.bases.low_rank import LowRankMethod, add_branch, dropped_input, kept
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.lora import LoRA

aten = torch.ops.aten


class LoRAMethod(LowRankMethod[LoRA], Initialised[LoRA]):
    """``y = W x + b + s B A drop(x)`` with ``A: [rank, in]`` and ``B: [out, rank]``.

    ``s`` is ``alpha / rank``, or ``alpha / sqrt(rank)`` with ``rslora`` (Kalajdzievski 2023, arXiv:2312.03732).
    ``kaiming`` and ``gaussian`` start with ``B = 0``, ``orthogonal`` with ``B A = 0``
    (https://datta0.github.io/posts/rethink-lora-init), ``random`` with a different function from the base's. ``pissa``
    (Meng et al. 2024, arXiv:2404.02948) and ``olora`` (Buyukakyuz 2024, arXiv:2406.01775) initialise ``B A`` to a part
    of ``W``; conventionally they subtract that part from ``W``. Here frozen copies of the initial factors are
    subtracted in the branch instead: the initial function equals the base's bit for bit, and ``W`` stays unchanged.
    ``loftq`` (Li et al. 2023, arXiv:2310.08659) starts from the quantisation error of ``W``: ``s B A`` is the matrix of
    rank ``rank`` that is closest to the error, and is not subtracted. With several iterations, it alternates between
    ``Q = quantised(W - B A)`` and the factors of ``W - Q``, and the base has the codes of the last ``Q``.

    The branch is scaled where it is narrowest, on the ``rank`` axis; in eval mode, the sum that adds it applies scales
    of at least 1. Dropout acts on the branch's input only.

    Each expert has its own pair of factors, ``A: [experts, rank, in]`` and ``B: [experts, out, rank]``. In a
    convolution, ``in`` counts the entries of a patch. An embedding table starts with ``A = 0`` instead of ``B = 0``.

    ``eva`` (Paischer et al. 2024, arXiv:2410.07170) and ``lora_ga`` (Wang et al. 2024, arXiv:2407.05000) start from
    examples, by `graftc.passes.methods.bases.example_starts`.

    With ``freeze_a`` (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303), ``A`` is not trained, so the branch's input, which
    is needed only for the gradient of ``A``, is not saved for the backward pass.
    """

    def prepare(self, spec: LoRA, sites: Sequence[LinearSite], build: Builder) -> None:
        """Train all biases that the Program reads if the spec has ``bias: all``."""
        if spec.bias != "all":
            return
        for name in build.tensors():
            module, _, last = name.rpartition(".")
            if last == "bias":
                with build.on(ParameterSite(SiteKey(module, last), tensor=name)):
                    build.overlay(name)

    input_part = "A"

    def insert(self, spec: LoRA, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC017 for ``eva`` and ``lora_ga`` at anything but a dense layer; GC002 if a branch across the
                groups of a convolution is impossible, for example because the number of groups does not divide the
                rank; GC020 when the rank exceeds ``min(in, out)`` without ``excess_rank``.
        """
        if spec.init in FROM_EXAMPLES:
            check_site(spec, site)
        if _meets_groups(spec, site):
            add_branch(spec, site, build, *_across_groups(spec, site, build), spec.scaling)
        else:
            self._insert_beside(spec, site, build)
        if spec.bias == "lora_only" and site.own_bias is not None:
            build.overlay(site.own_bias)

    def _insert_beside(self, spec: LoRA, site: LinearSite, build: Builder) -> None:
        if spec.init == "loftq" and spec.loftq_iterations > 1:
            factors_of = partial(_last_but_one, spec, site, build)
            build.requantise(site, spec.rank, factors_of, "set loftq_iterations: 1")
        down, up = _starts(spec, site, build)
        excess = spec.excess_rank and spec.init not in (*_FROM_WEIGHT, "loftq")  # a weight has no further directions
        a, b = factors(build, site, spec.rank, down, up, freeze_down=spec.freeze_a, excess_rank=excess)
        x = build.input(site)
        subtracts = spec.init in (*_FROM_WEIGHT, "lora_ga")
        if subtracts:
            # If the input is not contiguous, torch computes products differently for weights that require gradients,
            # and the initial factors would not cancel bit for bit.
            x = build.call(aten.contiguous.default, x, part="contiguous")
        delta = build.low_rank(site, dropped_input(spec, x, build), a, b, spec.scaling)
        if subtracts:
            starts = (zeros, zeros) if spec.init == "lora_ga" else (down, up)
            a0, b0 = (
                build.parameter(f"{part}0", tuple(node.meta["val"].shape), start, dtype=site.dtype, trainable=False)
                for part, node, start in zip("AB", (a, b), starts, strict=True)
            )
            start = build.low_rank(site, x, a0, b0, spec.scaling)
            delta = build.call(aten.sub.Tensor, delta, start, part="minus start")
        build.add(site, delta)

    def repeats(self, spec: LoRA) -> bool:
        """Return whether the insertion depends only on the spec and the types of the site's own tensors."""
        return spec.init in _ANEW and spec.bias == "none"

    def reads_channels(self, spec: LoRA) -> bool:
        """Return whether the branch reads the channels of all groups of a convolution."""
        return spec.across_groups

    def fold(self, spec: LoRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the update into the weight: ``W' = W + s B A``, minus ``s B0 A0`` if the factors started from ``W``.

        An update across groups stays in the graph.
        """
        if _meets_groups(spec, site):
            return Keep("its update reads the channels of all groups, unlike the convolution")

        def change(weight: Tensor) -> Tensor:
            weight = added(weight, *self.update(spec, tensors))
            if "A0" in tensors:
                weight = added(weight, tensors["B0"], tensors["A0"], -spec.scaling)
            return weight

        return weight_fold(change)

    def update(self, spec: LoRA, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return ``B``, ``A`` and the scale."""
        return tensors["B"], tensors["A"], spec.scaling

    def exchangeable(self, spec: LoRA, size: int) -> LoRA | None:
        """Return a LoRA of this rank whose scale is 1, with the same biases; None for a branch across groups."""
        if spec.across_groups:
            return None
        return LoRA(rank=size, alpha=size, excess_rank=True, **kept(spec, "name", "target", "dtype", "bias"))

    def exchanged(self, spec: LoRA, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the factors with the scale in ``B``, and next to them those of a product that is subtracted."""
        factors = ("A", "B", "A0", "B0", *REQUANTISED_PARTS)
        biases = {part: tensor for part, tensor in tensors.items() if part not in factors}
        a, b = tensors["A"], tensors["B"]
        if "A0" in tensors:
            a, b = torch.cat([a, tensors["A0"]], -2), torch.cat([b, -tensors["B0"]], -1)
        return {**biases, "A": a, "B": b * spec.scaling}

    def starts_from(self, spec: LoRA, places: Sequence[AdaptedSite[LoRA]]) -> Literal["inputs", "gradients"] | None:
        """Return what ``eva`` and ``lora_ga`` read; None for other initialisers, and once it has been done."""
        if spec.init == "eva":
            return "inputs"
        done = any(bool(place.tensors["A0"].any()) for place in places if "A0" in place.tensors)
        return "gradients" if spec.init == "lora_ga" and not done else None

    def components(self, place: AdaptedSite[LoRA]) -> int:
        """Return the largest rank that ``eva`` may give the site."""
        return most_components(place)

    def initialised(
        self, spec: LoRA, places: Sequence[AdaptedSite[LoRA]], statistics: Sequence[PrincipalComponents | Tensor]
    ) -> Transition[LoRA]:
        """Return the factors that examples determine."""
        return from_inputs(spec, places, statistics) if spec.init == "eva" else from_gradients(spec, places, statistics)

    def row_axes(self, spec: LoRA) -> Mapping[str, int]:
        """Return the row axes of ``B`` and ``B0``."""
        return {"B": -2, "B0": -2}


def _meets_groups(spec: LoRA, site: LinearSite) -> bool:
    return spec.across_groups and site.use.grouped


def _across_groups(spec: LoRA, site: LinearSite, build: Builder) -> tuple[fx.Node, fx.Node]:
    """Create factors that span all groups of a convolution.

    Raises:
        GraftError: GC002 if that is impossible.
    """
    groups = site.use.entries // site.own.shape[1]
    if spec.rank % groups or not site.columns.whole or spec.init not in _ANEW:
        message = f"the {groups} groups of {site.key} do not divide rank {spec.rank} evenly"
        if not spec.rank % groups:
            message = f"a LoRA across the groups of {site.key} must adapt all rows and cannot start from the weight"
        hint = "choose another rank, or leave the site out with exclude"
        raise GraftError("GC002", message, place=Place(path="across_groups"), hint=hint)
    columns, rank = site.in_features * groups, spec.rank // groups
    down = normal(1 / spec.rank) if spec.init == "gaussian" else uniform
    up = within(1 / math.sqrt(rank)) if spec.init == "random" else zeros
    a = build.parameter("A", (spec.rank, columns), down, dtype=site.dtype, trainable=not spec.freeze_a)
    return a, build.parameter("B", (site.out_features, rank), up, dtype=site.dtype)


def _pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return A and B from the first ``rank`` singular directions, so that ``s B A`` is their part of the weight.

    Each factor contains the square roots of the singular values.
    """
    u, s, v = torch.linalg.svd(_single(weight), full_matrices=False)
    root = (s[..., :rank] / scaling).sqrt()
    return root[..., :, None] * v[..., :rank, :], u[..., :rank] * root[..., None, :]


def _last_but_one(spec: LoRA, site: LinearSite, build: Builder) -> tuple[Tensor, Tensor]:
    """Return the factors of the last iteration of LoftQ but one, whose product is subtracted before packing."""
    original = build.read_original(site)
    a, b = _pissa(build.quantisation_error(site), spec.rank, 1.0)
    for _ in range(spec.loftq_iterations - 2):
        a, b = _pissa(original - build.packed_without(site, a, b), spec.rank, 1.0)
    return a, b


def _olora(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the first ``rank`` rows of R and columns of Q, unchanged."""
    q, r = torch.linalg.qr(_single(weight))
    return r[..., :rank, :], q[..., :rank]


def _single(weight: Tensor) -> Tensor:
    """Return the weight in float32 or wider.

    PEFT's checkpoints lack the initial factors, and the product that PEFT subtracts from the base on loading comes from
    a float32 decomposition: a wider one would yield a different base.
    """
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


_FROM_WEIGHT = {"pissa": _pissa, "olora": _olora}
_ANEW = ("kaiming", "gaussian", "random", "eva", "lora_ga")
"""Initialisations that draw each element independently of the weight."""


def _starts(spec: LoRA, site: LinearSite, build: Builder) -> tuple[Initialiser, Initialiser]:
    """Return the initialisers of A and B."""
    if spec.init not in _FROM_WEIGHT and spec.init != "loftq":
        if isinstance(site, EmbeddingSite):
            # As in loralib: each row of a table is looked up on its own, so its fan-in is one.
            if spec.init == "random":
                return normal(1), normal(1)
            return (normal(1), zeros) if spec.freeze_a else (zeros, normal(1))
        if spec.init == "orthogonal":
            return _orthogonal(spec, site, build)
        if spec.init == "random":
            return uniform, within(1 / math.sqrt(spec.rank * math.prod(site.leading)))
        return normal(1 / spec.rank) if spec.init == "gaussian" else uniform, zeros
    if build.store.device().type == "meta":
        return zeros, zeros

    @cache
    def parts() -> tuple[Tensor, Tensor]:
        if spec.init == "loftq":
            a, b = _pissa(build.quantisation_error(site), spec.rank, spec.scaling)
            build.correct(site, a, spec.scaling * b)
            return a, b
        return _FROM_WEIGHT[spec.init](build.read_weight(site), spec.rank, spec.scaling)

    return (lambda tensor, _: _copy(tensor, parts()[0])), (lambda tensor, _: _copy(tensor, parts()[1]))


def _orthogonal(spec: LoRA, site: LinearSite, build: Builder) -> tuple[Initialiser, Initialiser]:
    """Return initialisers with ``B A = 0``: A uses the even rows of a random orthogonal matrix, and B the odd rows.

    Raises:
        GraftError: GC020 for an odd rank.
    """
    if spec.rank % 2:
        message = f"init: orthogonal splits the rank in two, but {spec.rank} is odd"
        raise GraftError("GC020", message, place=Place(path="rank"), hint=f"use rank {spec.rank + 1}, or another init")

    @cache
    def half(odd: bool) -> Tensor:
        shape = (*site.leading, spec.rank, spec.rank)
        drawn = torch.randn(shape, generator=build.generator(f"{build.adaptation}/{site.key}/orthogonal"))
        q, _ = torch.linalg.qr(drawn)
        return cast("Tensor", q[..., int(odd) :: 2, :])

    def down(tensor: Tensor, generator: torch.Generator) -> None:
        drawn = torch.randn((*site.leading, site.in_features, spec.rank // 2), generator=generator)
        _copy(tensor, (drawn @ half(False)).mT / 10)

    def up(tensor: Tensor, generator: torch.Generator) -> None:
        drawn = torch.randn((*site.leading, site.out_features, spec.rank // 2), generator=generator)
        _copy(tensor, drawn @ half(True) / 10)

    return down, up


def _copy(tensor: Tensor, value: Tensor) -> None:
    tensor.copy_(value)
