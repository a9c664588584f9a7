"""Models that are wrapped, or sharded over processes, by torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""Under which names wrappers of modules for checkpointing, FSDP1 and `torch.compile` hold what they wrap."""


def computing_dtype(unit: nn.Module) -> torch.dtype | None:
    """Return the dtype that FSDP2's `MixedPrecisionPolicy` casts a unit's parameters to; None if it casts none.

    A unit does not give the policy back that `fully_shard` was called with.
    """
    state = getattr(unit, "_get_fsdp_state", lambda: None)()
    dtype = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def process_store() -> Any:
    """Return the store of keys and values that the processes of the default group share; groups do not offer theirs."""
    return torch.distributed.distributed_c10d._get_default_store()
