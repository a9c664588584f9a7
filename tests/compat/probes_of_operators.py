"""Probes: operators and their schemas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.compat.table import covers


@covers("torch._ops.OpOverload._schema")
def operators_have_schemas() -> None:
    from graftc.compat.operators import schema_of

    aten = torch.ops.aten
    add, in_place, view = map(schema_of, (aten.addmm.default, aten.add_.Tensor, aten.view.default))
    assert [argument.name for argument in add.arguments] == ["self", "mat1", "mat2", "beta", "alpha"]
    assert isinstance(add.arguments[0].type, torch.TensorType) and add.arguments[3].default_value == 1
    assert add.arguments[3].kwarg_only and not add.arguments[0].kwarg_only
    assert in_place.is_mutable and not add.is_mutable
    assert in_place.arguments[0].is_write and in_place.arguments[0].alias_info.is_write
    assert view.returns[0].alias_info is not None and add.returns[0].alias_info is None
    assert [str(result.type) for result in schema_of(aten.unbind.int).returns] == ["List[Tensor]"]


@covers("torch._ops.HigherOrderOperator", "torch._ops.OperatorBase", "torch._ops.OpOverloadPacket")
def operators_have_kinds() -> None:
    from torch._higher_order_ops import cond

    from graftc.compat.operators import HigherOrderOperator, OperatorBase, OpOverloadPacket

    one = torch.ops.aten.add.Tensor
    assert isinstance(torch.ops.higher_order.cond, HigherOrderOperator) and callable(cond)
    assert isinstance(one, OperatorBase) and not isinstance(one, HigherOrderOperator)
    assert isinstance(one.overloadpacket, OpOverloadPacket) and not isinstance(one, OpOverloadPacket)


def _traced(function: Callable[..., Any], *inputs: Tensor) -> list[Any]:
    from torch.fx.experimental.proxy_tensor import make_fx

    return [node.target for node in make_fx(function)(*inputs).graph.nodes]


@covers("torch.ops.aten._to_copy", "torch.ops.aten._unsafe_view")
def graphs_have_operators_of_these_names() -> None:
    from graftc.compat.operators import TO_COPY, UNSAFE_VIEW

    assert TO_COPY in _traced(lambda x: x.to(torch.float64), torch.ones(2))
    assert UNSAFE_VIEW in _traced(lambda x, w: x @ w, torch.ones(2, 3, 4), torch.ones(4, 5))


@covers("torch.ops.aten._local_scalar_dense")
def reading_a_value_is_an_operator() -> None:
    from graftc.compat.modes import TorchDispatchMode
    from graftc.compat.operators import LOCAL_SCALAR

    called: list[Any] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func)
            return func(*args, **(kwargs or {}))

    with Recording():
        assert torch.ones(1).item() == 1
    assert LOCAL_SCALAR in called


@covers("torch.ops.aten._is_all_true", "torch.ops.aten._assert_scalar", "torch.ops.aten._assert_tensor_metadata")
def checks_of_values_are_operators() -> None:
    from graftc.compat.operators import ASSERT_SCALAR, ASSERT_TENSOR_METADATA, IS_ALL_TRUE

    class Checking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._check_tensor_all(x > 0, "text")
            return x.to(torch.float64)

    graph = torch.export.export(Checking(), (torch.ones(2),), strict=False).graph
    assert graph.find_nodes(op="call_function", target=ASSERT_TENSOR_METADATA)
    (checked,) = graph.find_nodes(op="call_function", target=IS_ALL_TRUE)
    below = {checked}
    for node in graph.nodes:  # in order, so that all users of a node come behind it
        below |= {node} if below.intersection(node.all_input_nodes) else set()
    assert below.intersection(graph.find_nodes(op="call_function", target=ASSERT_SCALAR))


@covers("torch.ops.aten._grouped_mm", "torch.ops.aten._safe_softmax")
def operators_that_compute() -> None:
    from graftc.compat.operators import GROUPED_MM, SAFE_SOFTMAX

    x, w = torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(2, 8, 8, dtype=torch.bfloat16)
    ends = torch.tensor([1, 3], dtype=torch.int32)
    assert torch.equal(GROUPED_MM(x, w, ends), torch.full((3, 8), 8.0, dtype=torch.bfloat16))
    scores = torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]])
    assert torch.equal(SAFE_SOFTMAX(scores, -1), torch.tensor([[0.5, 0.5], [0.0, 0.0]]))


@covers(
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._scaled_dot_product_fused_attention_overrideable",
)
def kernels_of_attention_are_operators() -> None:
    from graftc.compat.operators import CPU_FLASH_ATTENTION, OTHER_FUSED_ATTENTION

    q = torch.ones(1, 1, 2, 8)
    assert torch.equal(CPU_FLASH_ATTENTION(q, q, q)[0], q)
    assert str(OTHER_FUSED_ATTENTION.default).endswith("overrideable.default")
