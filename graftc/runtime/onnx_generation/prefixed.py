"""Put a prefix in the place of virtual tokens, so that graphs with a cache can begin with them.

What a decoder computes for tokens in front of a text does not depend on the text. Their keys and values are therefore
the same in every call, and a prefix with these keys and values gives the same results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftc.compiler.inspect.snapshot import adapter_values
from graftc.passes.core.ir.past_inputs import past_name
from graftc.passes.core.weights.names import owner_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.initial_cache import in_cache_order, initial_cache
from graftc.runtime.model.runner import runner_of
from graftc.specs.methods.prefix import Prefix


@torch.no_grad()
def prefixed(runner: AdaptedRunner) -> AdaptedRunner:
    """Return the Runner of a model with a prefix for virtual tokens, or the same Runner if none can take their place.

    The prefix has the name of the adaptation that it replaces. It is computed with all other adaptations as they are.
    """
    spec = runner.spec
    if not any(own.virtual_tokens() for own in spec.adapt):
        return runner
    evaluated = runner
    if runner.training:  # another model, so that the mode of this one does not change while others use it
        evaluated = runner_of(runner.sibling(spec, dict(adapter_values(runner.store))).eval())
    initial = initial_cache(evaluated)
    if initial is None:
        return runner
    (name,) = initial.names
    prefix = Prefix(name=name, length=initial.length, positions="shifted", window="masked")
    adapt = tuple(prefix if own.name == name else own for own in spec.adapt)
    values = {n: t for n, t in adapter_values(runner.store) if owner_of(n) != name}
    found: AdaptedRunner = runner_of(runner.sibling(spec.model_copy(update={"adapt": adapt}), values))
    compilation = found.compilation
    for number, site in enumerate(in_cache_order(compilation)):
        tensors = compilation.parts[name][site.key]
        for part, columns in (("key", site.keys), ("value", site.values)):
            assert columns is not None
            table = compilation.store.get(tensors[f"{part}s"])
            table.copy_(_as_table(initial.tensors[past_name("past", number, part)], columns, table))
    found.module.eval()
    return found


def _as_table(heads: Tensor, columns: Tensor, like: Tensor) -> Tensor:
    """Return keys or values of a cache, ``[1, heads, length, width]``, as a prefix's table, ``[length, features]``."""
    own = torch.unique_consecutive(columns, dim=0).to(like.device)
    table = torch.zeros_like(like)
    table[:, own.flatten()] = heads[0].transpose(0, 1).flatten(1).to(like)
    return table
