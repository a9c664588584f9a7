"""Convert tensors to and from the forms in which peft's files store them, named by `graftc.specs.peft.Form`.

Each form is a pair of functions that only rearrange entries and are inverses of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from graftc.specs.peft import Form


@dataclass(frozen=True)
class Shaped:
    """Properties, besides the tensor itself, that determine a tensor's stored form.

    Attributes:
        experts: number of matrices along a leading axis; None if the weight is a single matrix.
        kernel: kernel size of a convolution; empty for other weights.
        inward: whether a vector applies to the map's input.
        order: position in the file of each row; None if the order is the same.
        turned: whether the file's matrices are for the transposed weight.
        matrix: rows and columns of the weight; None if they are unknown, or if the weight is not a stored matrix.
    """

    experts: int | None = None
    kernel: tuple[int, ...] = ()
    inward: bool = False
    order: tuple[int, ...] | None = None
    turned: bool = False
    matrix: tuple[int, int] | None = None


_Turn: TypeAlias = Callable[[Tensor, Shaped], Tensor]


def to_ours(form: Form, tensor: Tensor, shaped: Shaped) -> Tensor:
    """Convert a tensor from a file to graftc's form; the result is a view if the entries keep their order.

    Raises:
        ValueError: if its shape does not fit the form, or its integers do not fit the weight.
    """
    try:
        ours = _FORMS[form][0](tensor, shaped)
        return ours.transpose(-1, -2) if shaped.turned else ours
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{list(tensor.shape)} is not the shape of a tensor in the form {form!r}") from error


def to_theirs(form: Form, tensor: Tensor, shaped: Shaped) -> Tensor:
    """Convert one of graftc's tensors to the file's form; the inverse of `to_ours`."""
    return _FORMS[form][1](tensor.transpose(-1, -2) if shaped.turned else tensor, shaped)


def _down(tensor: Tensor, shaped: Shaped) -> Tensor:
    if shaped.experts is not None:
        return tensor.reshape(shaped.experts, -1, tensor.shape[-1])
    return tensor.flatten(1)


def _down_back(tensor: Tensor, shaped: Shaped) -> Tensor:
    if shaped.experts is not None:
        return tensor.flatten(0, 1)
    return tensor.reshape(tensor.shape[0], -1, *shaped.kernel) if shaped.kernel else tensor


def _up(tensor: Tensor, shaped: Shaped) -> Tensor:
    if shaped.experts is not None:  # columns are ordered by rank, then by expert
        return tensor.reshape(tensor.shape[0], -1, shaped.experts).permute(2, 0, 1)
    return tensor.flatten(1)


def _up_back(tensor: Tensor, shaped: Shaped) -> Tensor:
    if shaped.experts is not None:
        return tensor.permute(1, 2, 0).flatten(1)
    return tensor.reshape(*tensor.shape, *(1 for _ in shaped.kernel))


def _vector_back(tensor: Tensor, shaped: Shaped) -> Tensor:
    return tensor.reshape(1, -1, *(1 for _ in shaped.kernel)) if shaped.kernel else tensor


def _flat(tensor: Tensor, shaped: Shaped) -> Tensor:
    if sum(size != 1 for size in tensor.shape) > 1:
        raise IndexError
    return tensor.flatten()


def _scale_back(tensor: Tensor, shaped: Shaped) -> Tensor:
    if shaped.kernel:
        return tensor.reshape(1, -1, *(1 for _ in shaped.kernel))
    return tensor.reshape(1, -1) if shaped.inward else tensor.reshape(-1, 1)


def _rows(tensor: Tensor, shaped: Shaped) -> Tensor:
    return tensor if shaped.order is None else tensor[torch.tensor(shaped.order)]


def _rows_back(tensor: Tensor, shaped: Shaped) -> Tensor:
    if shaped.order is None:
        return tensor
    return torch.empty_like(tensor).index_copy_(0, torch.tensor(shaped.order), tensor)


def _places(tensor: Tensor, shaped: Shaped) -> Tensor:
    if shaped.matrix is None:
        raise IndexError
    rows, columns = shaped.matrix
    if tensor.dim() != 2 or tensor.shape[0] != 2 or tensor.is_meta:
        raise IndexError
    # PEFT writes the integers as float32 on Windows.
    first, second = tensor.long()
    if not torch.equal(tensor.long().to(tensor.dtype), tensor):
        raise ValueError("the entries must be whole numbers")
    flat: Tensor = first * columns + second
    inside = (first >= 0) & (first < rows) & (second >= 0) & (second < columns)
    if not bool(inside.all()) or not bool((flat[1:] > flat[:-1]).all()):
        raise ValueError(f"the entries must be different ones of a {rows} x {columns} matrix, in ascending order")
    return flat


def _places_back(tensor: Tensor, shaped: Shaped) -> Tensor:
    assert shaped.matrix is not None
    columns = shaped.matrix[1]
    return torch.stack([tensor // columns, tensor % columns]).int()


def _same(tensor: Tensor, shaped: Shaped) -> Tensor:
    return tensor


_FORMS: Mapping[Form, tuple[_Turn, _Turn]] = MappingProxyType(
    {
        "down": (_down, _down_back),
        "up": (_up, _up_back),
        "vector": (_flat, _vector_back),
        "column": (_flat, lambda tensor, shaped: tensor.reshape((1, -1) if shaped.kernel else (-1, 1))),
        "scale": (_flat, _scale_back),
        "rows": (_rows, _rows_back),
        "places": (_places, _places_back),
        "same": (_same, _same),
    }
)


INTEGERS: frozenset[Form] = frozenset({"places"})
"""The forms of tensors of integers."""


def filled(tensor: Tensor, axis: int | None, rank: int | None) -> Tensor:
    """Return a tensor padded with zeros along an axis up to a rank.

    The zeros stand for ranks that were removed during training.
    """
    if axis is None or rank is None or tensor.shape[axis] >= rank:
        return tensor
    size = list(tensor.shape)
    size[axis] = rank - size[axis]
    return torch.cat([tensor, tensor.new_zeros(size)], axis)
