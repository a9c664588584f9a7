"""torch's operators: their schemas, their classes, and operators whose names begin with an underscore."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator, OperatorBase, OpOverload, OpOverloadPacket

__all__ = [
    "ASSERT_SCALAR",
    "ASSERT_TENSOR_METADATA",
    "CPU_FLASH_ATTENTION",
    "GROUPED_MM",
    "IS_ALL_TRUE",
    "LOCAL_SCALAR",
    "OTHER_FUSED_ATTENTION",
    "SAFE_SOFTMAX",
    "TO_COPY",
    "UNSAFE_VIEW",
    "HigherOrderOperator",
    "OpOverloadPacket",
    "OperatorBase",
    "schema_of",
]

_aten: Any = torch.ops.aten

ASSERT_SCALAR = _aten._assert_scalar.default
ASSERT_TENSOR_METADATA = _aten._assert_tensor_metadata.default
CPU_FLASH_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
GROUPED_MM = _aten._grouped_mm.default
IS_ALL_TRUE = _aten._is_all_true.default
LOCAL_SCALAR = _aten._local_scalar_dense.default
OTHER_FUSED_ATTENTION = _aten._scaled_dot_product_fused_attention_overrideable
SAFE_SOFTMAX = _aten._safe_softmax
TO_COPY = _aten._to_copy.default
UNSAFE_VIEW = _aten._unsafe_view.default


def schema_of(target: OpOverload) -> Any:
    """Return the schema of an operator: its arguments, which of them it writes to, and its results.

    Operators have no public attribute for it.
    """
    return target._schema
