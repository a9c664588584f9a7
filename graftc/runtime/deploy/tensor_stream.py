"""Stream merged tensors to callers that push weights elsewhere; nothing is captured, certified or kept in memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graftc.compat.modules import transient_of
from graftc.compiler.capture.identity.fingerprint import tensor_digest
from graftc.compiler.capture.isolation import isolated
from graftc.compiler.folding.fold_plan import fold_plan
from graftc.compiler.folding.rounding import round_pieces
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.passes.core.weights.folds import FoldGroup, LazyTensors
from graftc.passes.core.weights.store import Store
from graftc.runtime.deploy.merged import require_weights
from graftc.runtime.interop.transformers import no_place
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.specs.errors.diagnostics import GraftError


class MergedTensors(Iterator[tuple[str, Tensor]]):
    """An iterator over a merged model's tensors, as returned by `Compiled.merged_state_dict`.

    It yields pairs of a name in the source model and a tensor. Each tensor is folded when it is requested, from the
    base's current values, and released when the next one is requested. Packed weights are yielded as values in full
    precision. The iterator makes one pass over the model; tensors requested after further training include its effect.

    Attributes:
        digests: SHA-256 of each tensor yielded so far, over its bytes in row-major order, by name; empty if digests
            were not requested. `graftc.compiler.capture.identity.fingerprint.tensor_digest` computes the same digest.
    """

    digests: dict[str, str]

    def __init__(self, compiled: AdaptedRunner, *, digests: bool = False) -> None:
        compilation = compiled.compilation
        require_weights(compiled)
        plan = fold_plan(compilation)
        if plan.kept:
            raise next(iter(plan.kept.values()))
        for name, tensor in adapter_values(compilation.store):
            if not compilation.store.is_buffer(name):  # a pruning threshold may be infinite
                _require_finite(name, tensor)
        self.digests = {}
        self._wanted = digests
        self._source = compilation.source
        self._tensors = self._merged(compilation.store, plan.lazy)

    def __next__(self) -> tuple[str, Tensor]:
        with isolated(), torch.no_grad():
            name, tensor = next(self._tensors)
            if self._wanted:
                self.digests[name] = tensor_digest(tensor)
        return name, tensor

    def _merged(self, store: Store, lazy: LazyTensors) -> Iterator[tuple[str, Tensor]]:
        groups = {name: group for group in lazy.groups() for name in group.names}
        given: set[str] = set()
        for name in [name for name, _ in store.weights() if _kept(store, name)]:
            if name in given:
                continue
            tensors = self._folded(lazy, groups[name]) if name in groups else {name: _own(store, name)}
            for each in list(tensors):
                tensor = tensors.pop(each)
                given.add(each)
                yield from ((called, tensor) for called in (each, *store.tied(each)) if _kept(store, called))

    def _folded(self, lazy: LazyTensors, group: FoldGroup) -> dict[str, Tensor]:
        """Return the tensors of a group, rounded.

        Raises:
            GraftError: GC051 if a tensor is not finite, GC052 for a bias that the class cannot hold.
        """
        values, rounded = lazy.fold(group), {}
        for name in filter(values.__contains__, group.names):
            if name not in lazy.store:
                raise no_place([name], self._source)
            exact = values.pop(name)
            rounded[name] = torch.empty(exact.shape, dtype=lazy.dtype(name), device=exact.device)
            round_pieces(rounded[name], exact)
            _require_finite(name, rounded[name])
        return rounded


def _own(store: Store, name: str) -> Tensor:
    """Return a tensor that folding does not change; a copy if graphs write to it."""
    value = store.full(name)
    return value.clone() if name in store.updated else value


def _kept(store: Store, name: str) -> bool:
    """Return whether the source model's state dict contains the tensor."""
    path, _, last = name.rpartition(".")
    return name not in store.constants and last not in transient_of(store.owner(path))


def _require_finite(name: str, tensor: Tensor) -> None:
    """Raise if a tensor has NaN or infinite values.

    Raises:
        GraftError: GC051.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        message = f"{name} has values that are not finite, so nothing is merged from it"
        raise GraftError("GC051", message, hint="look at the loss and the learning rate of the last steps")
