"""Access to models that torch has wrapped, or sharded over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod")
"""The attribute names under which wrappers for checkpointing, FSDP1 and `torch.compile` hold the wrapped module."""


def computing_dtype(unit: nn.Module) -> torch.dtype | None:
    """Return the dtype that FSDP2's `MixedPrecisionPolicy` casts a unit's parameters to; None if it does not cast them.

    A unit does not expose the policy that was passed to `fully_shard`.
    """
    state = getattr(unit, "_get_fsdp_state", lambda: None)()
    dtype = getattr(getattr(state, "_mp_policy", None), "param_dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def process_store() -> Any:
    """Return the key-value store that the processes of the default group share; groups do not expose theirs."""
    return torch.distributed.distributed_c10d._get_default_store()
