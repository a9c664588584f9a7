"""Certify that a cache which the base has filled can be continued with an adaptation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compat.caches import cache_of
from graftc.compiler.capture.past import POSITIONS, fill_cache, new_cache, tensors_of
from graftc.records.verification import CacheReuse, RowReuse
from graftc.runtime.invocations import positions_of, starts_in_prompt
from graftc.runtime.model.evaluation import in_eval_mode
from graftc.runtime.model.feature import Feature
from graftc.specs.errors.arguments import as_mapping
from graftc.specs.errors.diagnostics import GraftError


class Reusing(Feature):
    """Compares the keys and values of an adapted model with those of its base."""

    @torch.no_grad()
    def certify_reuse(self, batch: Mapping[str, Any]) -> CacheReuse:
        """Compare the keys and values of a text's tokens with the base's, bit for bit, up to the invocation.

        The base and the adapted model each run the batch with a cache, in eval mode. Both caches are then cut before
        the first invocation, and the adapted model continues each of them.

        Args:
            batch: the arguments of a call by name: ``input_ids``, int64 ``[rows, tokens]``, and others such as
                ``attention_mask`` or the start of an aLoRA.

        Returns:
            A record whose ``passed`` is true if everything before the invocation is equal. It is false, for example, if
            another adaptation changes earlier tokens as well, or if attention is not causal.

        Raises:
            GraftError: GC073 if the batch has no tokens in ``input_ids`` or the model has no aLoRA; GC140 if the model
                keeps no cache of keys and values; GC141 for an adaptation that no cache can hold.
        """
        runner, given = self.runner, dict(as_mapping(batch, "batch", object))
        ids = given.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
            raise GraftError("GC073", "the batch has no tokens in input_ids [rows, tokens]", hint="add input_ids")
        starts = starts_in_prompt(runner.shown.compilation, ids)
        said = [name for name in starts if given.get(name) is not None]
        starts |= {name: positions_of(name, given[name], len(ids), ids.device) for name in said}
        if not starts:
            hint = "every adaptation of the model acts on all tokens"
            raise GraftError("GC073", "the model has no aLoRA, whose start a text would show", hint=hint)
        own = torch.stack(list(starts.values())).clone()
        own[own < 0] = ids.shape[1]
        first = own.amin(0)
        rest = {name: value for name, value in given.items() if name not in starts}
        with in_eval_mode(runner.module):
            base = runner.within(lambda: runner.of_base().call((), {**rest, "use_cache": True}))
            adapted = runner.within(lambda: runner.call((), {**rest, **starts, "use_cache": True}))
            caches = [tensors_of(cache_of(outputs)) for outputs in (base, adapted)]
            cut = int(first.min())
            continued = None
            if 0 < cut < ids.shape[1]:
                logits = [self._continued(rest, starts, cache, cut) for cache in caches]
                continued = bool(_same(*logits).all())
        equal = torch.stack([_same(caches[0][name], caches[1][name]).all(3).all(1) for name in caches[0]]).all(0)
        lengths = equal.long().cumprod(1).sum(1).tolist()
        shown = [start if start < ids.shape[1] else -1 for start in first.tolist()]
        rows = tuple(RowReuse(start, length) for start, length in zip(shown, lengths, strict=True))
        return CacheReuse(rows, ids.shape[1], len(caches[0]), continued)

    def _continued(
        self, given: Mapping[str, Any], starts: Mapping[str, Tensor], cache: Mapping[str, Tensor], cut: int
    ) -> Tensor:
        """Return the logits of the tokens after the first ``cut`` ones, with a cache of those."""
        front = {name: tensor[:, :, :cut].clone() for name, tensor in cache.items()}
        later = {n: v[:, cut:] if n in ("input_ids", POSITIONS, "token_type_ids") else v for n, v in given.items()}
        call = {**later, **starts, "cache": fill_cache(new_cache(False), front)}
        logits: Tensor = self.runner.within(lambda: self.runner.call((), call)).logits
        return logits


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors of one dtype have the same bits, in their shape."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.view(bits) == b.view(bits)
