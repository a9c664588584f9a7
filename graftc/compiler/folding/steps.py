"""Build the fold steps: the changes that adaptations make to base tensors, in the order in which they apply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.rounding import NARROW
from graftc.compiler.resolve.compose import Unit, averaged, keep_composed
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.method.folding import fold_at, wrong_fold
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.sites.uses import Dense
from graftc.passes.core.weights.folds import (
    FoldStep,
    Keep,
    LazyTensors,
    StandIn,
    TensorFold,
    WeightFold,
)
from graftc.passes.core.weights.tensor_edits import TensorEdit
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice
from graftc.passes.graph.remove_folded import added_bias
from graftc.specs.errors.diagnostics import GraftError

Read = Callable[[str], Tensor]
"""Returns an adapter tensor by its name in the Store."""


class OwnSteps(NamedTuple):
    """The steps of one adaptation.

    Attributes:
        below: the steps that apply before all changes to sites' weights.
        above: the changes to sites' weights.
    """

    below: list[FoldStep]
    above: list[FoldStep]


def fold_steps(compilation: Compilation, only: Sequence[str] | None = None, read: Read | None = None) -> list[FoldStep]:
    """Return every adaptation's changes to base tensors, in the order in which they apply.

    Replacements of stored tensors, and other changes to tensors as stored, apply before all changes to sites' weights;
    both kinds are in insertion order.

    Args:
        compilation: the compilation to fold.
        only: names of adaptations; by default all.
        read: returns an adapter tensor by name; by default from the Store.

    Raises:
        GraftError: GC050, naming the adaptation that cannot fold, with the reason.
    """
    names = only if only is not None else [TOKENS, TRAIN, *compilation.unit_of]
    return in_order(own_steps(compilation, name, read) for name in names)


def own_steps(compilation: Compilation, name: str, read: Read | None = None) -> OwnSteps:
    """Return one adaptation's fold steps; none if it has nothing to fold. Args and errors as for `fold_steps`."""
    read = read or compilation.store.full
    unit = compilation.unit_of.get(name)
    own = site_steps(compilation, unit, read) if unit is not None else []
    below = [step for step in own if step.weight.layout is Layout.PLAIN]
    above = [step for step in own if step.weight.layout is not Layout.PLAIN]
    return OwnSteps([*_overlay_steps(compilation, name, read), *below], above)


def in_order(every: Iterable[OwnSteps]) -> list[FoldStep]:
    """Return the steps of several adaptations in the order in which they apply."""
    all_steps = list(every)
    return [step for own in all_steps for step in own.below] + [step for own in all_steps for step in own.above]


def site_steps(compilation: Compilation, unit: Unit, read: Read | None = None) -> list[FoldStep]:
    """Return the changes that an adaptation or a composition makes to its sites' weights. Args as for `fold_steps`.

    Raises:
        GraftError: GC050 if it cannot fold, GC022 if anything else reads a weight.
    """
    resolved = unit.members[0]
    method = method_for(resolved.spec.method)
    read = read or compilation.store.full
    steps: list[FoldStep] = []
    for site, spec in resolved.places:
        tensors = averaged(unit, compilation.parts, site.key, read)
        fold = keep_composed(fold_at(method, spec, site, tensors), unit)
        if isinstance(fold, StandIn):
            continue
        if isinstance(fold, Keep):
            raise GraftError("GC050", f"{unit.name!r} cannot fold at {site.key}: {fold.reason}")
        if isinstance(fold, TensorFold):
            steps += _tensor_steps(compilation, unit.name, site, spec.method, fold)
            continue
        assert isinstance(site, LinearSite)
        if site.key in resolved.shared:
            raise GraftError(
                "GC022",
                f"{unit.name!r} would fold into {site.key}, which {resolved.shared[site.key]}",
                hint="folding would change both; untie the module with untie:, or leave this site out",
            )
        if isinstance(site.use, Dense) and site.use.addend is not None and _changes_bias(compilation, site, fold):
            reason = "it changes the bias, which the model computes from other tensors"
            raise GraftError("GC050", f"{unit.name!r} cannot fold at {site.key}: {reason}")
        bias = site.own_bias or _new_bias(compilation, site)
        if bias is None and isinstance(site.use, Dense) and _adds_bias(compilation, site, fold):
            reason = "it adds a bias, and the model has no place for one"
            raise GraftError("GC050", f"{unit.name!r} cannot fold at {site.key}: {reason}")
        steps.append(FoldStep(unit.name, str(site.key), site.own, bias, fold.apply))
    return steps


def _tensor_steps(compilation: Compilation, name: str, site: Site, method: str, fold: TensorFold) -> list[FoldStep]:
    steps: list[FoldStep] = []
    slices = slices_of(site, compilation.store)
    parts = [own.part for own in slices]
    for part in fold.changes:
        if part not in parts:
            raise wrong_fold(method, site, f"changes {part!r}; the site has: {', '.join(parts) or 'no tensors'}")
    for own in slices:
        if own.part in fold.changes:
            every = own.at(None).as_stored
            steps.append(FoldStep.of_tensor(name, str(site.key), every, fold.changes[own.part]))
    return steps


def _new_bias(compilation: Compilation, site: LinearSite) -> WeightSlice | None:
    """Return the bias that folding may add to a module that reads all of its own weight, otherwise None."""
    store, use = compilation.store, site.use
    bias = added_bias(use.node)
    own = store.canonical(f"{bias.removesuffix('bias')}weight") == use.weight.tensor and use.weight.whole
    free = isinstance(use, Dense) and use.addend is None and bias not in store
    return site.own.companion(bias) if own and free else None


def _adds_bias(compilation: Compilation, site: LinearSite, fold: WeightFold) -> bool:
    """Return whether a fold needs a bias where there is none."""
    device = compilation.store.get(site.own.tensor).device
    weight = torch.zeros(site.out_features, site.in_features, dtype=torch.float64, device=device)
    return fold.apply(weight, None)[1] is not None


def _changes_bias(compilation: Compilation, site: LinearSite, fold: WeightFold) -> bool:
    """Return whether a fold changes or drops a bias of ones; on ``meta``, without values, only dropping it counts."""
    device = compilation.store.get(site.own.tensor).device
    weight = torch.zeros(site.out_features, site.in_features, dtype=torch.float64, device=device)
    ones = torch.ones(site.out_features, dtype=torch.float64, device=device)
    _, changed = fold.apply(weight, ones.clone())
    return changed is None or (device.type != "meta" and not torch.equal(changed, ones))


def _overlay_steps(compilation: Compilation, name: str, read: Read) -> list[FoldStep]:
    def step(edit: TensorEdit) -> FoldStep:
        part = edit.site.part if edit.site is not None and not edit.own.whole else ""
        site = edit.own.tensor + (f"[{part}]" if part else "")
        return FoldStep.of_copy(name, site, edit.own, lambda: edit.own.oriented(read(edit.trained)))

    return [step(edit) for edit in compilation.tensor_edits.copies(name)]


def lazy_tensors(compilation: Compilation) -> LazyTensors:
    """Return the folded tensors: every base tensor that an adaptation changes, computed on demand."""
    return LazyTensors(compilation.store, fold_steps(compilation))


def recasting(compilation: Compilation, names: Sequence[str]) -> Callable[[str], Tensor]:
    """Return a function that computes how casting adapter tensors before the fold changes a folded tensor.

    These tensors are cast to the dtypes in which the adapted graph computes; the change is in float64.

    Args:
        compilation: the compilation to fold.
        names: names of the adaptations.
    """
    steps = fold_steps(compilation, names)
    cast, exact = as_cast(compilation, names), LazyTensors(compilation.store, steps)
    return lambda name: cast.folded(name).double().sub_(exact.folded(name))


def as_cast(compilation: Compilation, names: Sequence[str]) -> LazyTensors:
    """Return the tensors that result from folding adapter tensors in the dtypes in which the adapted graph computes.

    Args:
        compilation: the compilation to fold.
        names: names of the adaptations.
    """
    steps = fold_steps(compilation, names, _casting(compilation))
    return LazyTensors(compilation.store, steps)


def _casting(compilation: Compilation) -> Read:
    """Return a function that reads adapter tensors in the dtypes in which the adapted graph computes."""
    graph = compilation.program("eval").graph
    nodes = {str(node.target): node for node in graph.find_nodes(op="get_attr")}

    def read(name: str) -> Tensor:
        value, users = compilation.store.full(name), nodes[name].users if name in nodes else ()
        types = {user.meta["val"].dtype for user in users if user.target is torch.ops.aten.to.dtype}
        narrow = [dtype for dtype in NARROW if dtype in types]
        return value.to(narrow[0]) if narrow else value

    return read
