"""Probes: tensors, their storage, and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.compat.table import covers


@covers("torch.Tensor._version")
def writes_are_counted() -> None:
    from graftc.compat.tensors import version_of

    tensor = torch.zeros(2)
    before = version_of(tensor)
    tensor.add_(1)
    assert (before, version_of(tensor), version_of(tensor.detach())) == (0, 1, 1)
    with torch.inference_mode():
        assert version_of(torch.zeros(2).add_(1)) == 0


@covers("torch.Tensor._base")
def views_know_what_they_are_views_of() -> None:
    from graftc.compat.tensors import is_view

    tensor = torch.zeros(2)
    assert is_view(tensor[:1]) and not is_view(tensor) and not is_view(tensor.clone())


@covers("torch.UntypedStorage._cdata")
def storages_are_told_apart() -> None:
    from graftc.compat.fake_tensors import FakeTensorMode
    from graftc.compat.tensors import storage_key, storage_sizes

    with FakeTensorMode():
        one, other = torch.zeros(2), torch.zeros(2)
        assert storage_key(one) == storage_key(one[:1]) != storage_key(other)
        assert sorted(storage_sizes([one, one[1:], other]).values()) == [8, 8]


@covers("torch.Tensor._make_wrapper_subclass")
def tensors_without_storage_have_a_class() -> None:
    from graftc.compat.tensors import wrapper

    class Empty(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return torch.ones(int(func is torch.ops.aten.neg.default))

    empty = wrapper(Empty, (2, 3), torch.float16, torch.device("cpu"), strides=(1, 2), requires_grad=True)
    assert type(empty) is Empty and empty.shape == (2, 3) and empty.stride() == (1, 2)
    assert empty.dtype == torch.float16 and empty.requires_grad and torch.neg(empty).shape == (1,)


@covers("torch._C._functorch.peek_interpreter_stack")
def transforms_are_noticed() -> None:
    from graftc.compat.autograd import is_transformed

    asked = []
    torch.func.vmap(lambda x: asked.append(is_transformed()) or x)(torch.ones(2))
    assert asked == [True] and not is_transformed()


@covers("torch.autograd.forward_ad._current_level")
def forward_gradients_are_noticed() -> None:
    from graftc.compat.autograd import has_forward_gradients

    assert not has_forward_gradients()
    with torch.autograd.forward_ad.dual_level():
        assert has_forward_gradients()


@covers("torch.autograd.Variable._execution_engine")
def functions_run_behind_a_backward_pass() -> None:
    from graftc.compat.autograd import after_backward

    order: list[str] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: after_backward(lambda: order.append("behind")))
    x.register_hook(lambda _: order.append("within"))
    y.sum().backward()
    assert order == ["within", "behind"]


@covers("torch._C._autograd._top_saved_tensors_default_hooks")
def hooks_of_saved_tensors_are_read() -> None:
    from graftc.compat.autograd import saved_tensor_hooks

    def pack(tensor: Tensor) -> Tensor:
        return tensor

    assert saved_tensor_hooks() is None
    with torch.autograd.graph.saved_tensors_hooks(pack, Tensor.clone):
        assert saved_tensor_hooks() == (pack, Tensor.clone)
