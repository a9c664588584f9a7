"""Optimiser support: parameter groups, a check of the first steps, and optimisers for sparse deltas."""

from graftc.runtime.optim.groups import param_groups
from graftc.runtime.optim.sparse import SM3, AgedAdamW
from graftc.runtime.training.watching import Watch, watch

__all__ = ["SM3", "AgedAdamW", "Watch", "param_groups", "watch"]
