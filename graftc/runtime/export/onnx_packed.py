"""Store packed weights in ONNX files: codes and scales as they are, and ONNX Runtime operators that read them.

A weight that only linear maps read is multiplied by ``MatMulNBits`` or ``MatMulBnb4``, which never materialise it.
Any other weight is materialised by ``DequantizeLinear`` when a call needs it. When ONNX Runtime loads a file, it folds
everything that depends only on constants and would store the result in full precision, but it exempts that operator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graftc.passes.core.packing.affine import halves
from graftc.passes.core.packing.forms import EvenSteps, TableEntries
from graftc.passes.core.packing.packing import swapped
from graftc.runtime.export.module import PackedWeight

PACKED_OPSET = 21
"""The first opset in which ``DequantizeLinear`` supports blocks and 4 bits."""

_CONTRIB = "com.microsoft"
_BLOCKS = (256, 128, 64, 32, 16)
"""The block sizes that ``MatMulNBits`` supports, largest first."""

_WASTE = 1.07
"""The largest factor by which the codes may grow when rows are padded to whole blocks."""


def lower_packed(model: Any, weights: Mapping[str, PackedWeight]) -> None:
    """Replace a graph's packed-weight inputs with the weights' stored parts, in place.

    Args:
        model: an ``onnx_ir.Model`` with at least opset `PACKED_OPSET`.
        weights: the packed weights, by input name.
    """
    ir = importlib.import_module("onnx_ir")
    for value in [value for value in model.graph.inputs if value.name in weights]:
        _Lowering(ir, model, value, weights[value.name]).run()
        model.graph.inputs.remove(value)
    if any(node.domain == _CONTRIB for node in model.graph):
        model.opset_imports.setdefault(_CONTRIB, 1)


@dataclass(frozen=True)
class _Product:
    """A multiplication by a weight in the graph.

    Attributes:
        node: the node that computes it.
        bias: the value that the node adds, if any.
        between: the node between the weight and the product, if any.
    """

    node: Any
    bias: Any
    between: Any


class _Lowering:
    """Replaces one packed weight in a graph with its stored parts."""

    def __init__(self, ir: Any, model: Any, value: Any, weight: PackedWeight) -> None:
        self.ir, self.graph, self.value, self.weight = ir, model.graph, value, weight
        self.turned, self.name = weight.packing.transposed, value.name
        self.form = weight.form()
        self.before: Any = None

    def run(self) -> None:
        """Rewrite every node that reads the weight."""
        products = self._products()
        multiply = None if products is None else self._multiply()
        if products is None or multiply is None:
            self._make_dense()
            return
        for product in products:
            self.before = product.node
            result = self._node(*multiply(product.node.inputs[0]), like=product.node.outputs[0])
            if product.bias is not None:
                result = self._node("Add", [result, product.bias], like=product.node.outputs[0])
            self._replace(product.node.outputs[0], result)
            self.graph.remove(product.node, safe=True)
            if product.between is not None and not list(product.between.outputs[0].uses()):
                self.graph.remove(product.between, safe=True)

    def _products(self) -> list[_Product] | None:
        """Return the multiplications by the weight; None if anything else reads it or it is not a float32 matrix."""
        if len(self.weight.shape) != 2 or self.weight.dtype != torch.float32:
            return None
        products: list[_Product] = []
        for node, place in self.value.uses():
            if node.op_type == "Transpose" and not self.turned:
                uses = [(user, at, node) for user, at in node.outputs[0].uses()]
            else:
                uses = [(node, place, None)]
            for user, at, between in uses:
                turned = self.turned or between is not None
                product = self._product(user, at, between, turned)
                if product is None:
                    return None
                products.append(product)
        return products

    def _product(self, node: Any, place: int, between: Any, turned: bool) -> _Product | None:
        if place != 1:
            return None
        if node.op_type == "MatMul":
            return _Product(node, None, between) if turned else None
        if node.op_type != "Gemm" or any(_number(node, name, 1.0) != 1.0 for name in ("alpha", "beta")):
            return None
        if _number(node, "transA", 0) or bool(_number(node, "transB", 0)) == turned:
            return None
        return _Product(node, node.inputs[2] if len(node.inputs) > 2 else None, between)

    def _multiply(self) -> Callable[[Any], tuple[str, list[Any], dict[str, Any], str]] | None:
        """Return a function that describes the node that multiplies by the packed weight; None if no operator can."""
        rows, width = self.weight.shape[::-1] if self.turned else self.weight.shape
        sizes = {"K": width, "N": rows}
        if isinstance(self.form, TableEntries):
            if self.form.group < 16 or self.form.group & (self.form.group - 1):
                return None
            stored = [self._constant("codes", self.form.codes), self._constant("scales", self.form.scales)]
            attributes = {**sizes, "block_size": self.form.group, "quant_type": int(self.form.kind == "nf4")}
            return lambda x: ("MatMulBnb4", [x, *stored], attributes, _CONTRIB)
        block = block_of(self.form.group, width)
        if block is None:
            return None
        stored = [self._constant(name, part) for name, part in zip(_STORED, in_blocks(self.form, block), strict=False)]
        # Level 1 is float32; the default level of ONNX Runtime's own fusions rounds the inputs to 8 bits.
        attributes = {**sizes, "bits": self.form.bits, "block_size": block, "accuracy_level": 1}
        return lambda x: ("MatMulNBits", [x, *stored], attributes, _CONTRIB)

    def _make_dense(self) -> None:
        """Materialise the weight once, before the first node that reads it."""
        readers = {node for node, _ in self.value.uses()}
        self.before = next(node for node in self.graph if node in readers)
        dense = self._steps(self.form) if isinstance(self.form, EvenSteps) else self._entries(self.form)
        self._replace(self.value, dense)

    def _steps(self, form: EvenSteps) -> Any:
        codes, scales, zeros = form.codes, form.scales, form.zeros
        axis, size = -1, form.group
        if self.turned:
            codes, scales = codes.transpose(-1, -2), scales.transpose(-1, -2)
            zeros, axis = None if zeros is None else zeros.transpose(-1, -2), -2
        axis += codes.dim()
        own = self.ir.DataType.UINT4 if form.bits == 4 else self.ir.DataType.UINT8
        if zeros is None and form.bits == 8:  # signed codes need no stored zero points
            own, codes = self.ir.DataType.INT8, codes ^ 128
        elif zeros is None:
            zeros = torch.full_like(scales, 8, dtype=torch.uint8)
        stored = [self._constant("codes", codes, own), self._constant("scales", scales.to(self.weight.dtype))]
        if zeros is not None:
            stored.append(self._constant("zeros", zeros, own))
        attributes = {"axis": axis, "block_size": min(size, codes.shape[axis])}
        return self._node("DequantizeLinear", stored, attributes, like=self.value)

    def _entries(self, form: TableEntries) -> Any:
        """Return the weight looked up in a table, with codes that ONNX Runtime does not treat as constants."""
        size, ir = self.weight.numel, self.ir
        blocks = form.scales.numel()
        pairs = torch.nn.functional.pad(form.codes, (0, -form.codes.numel() % ((blocks * form.group + 1) // 2)))
        codes = torch.stack([pairs >> 4, pairs & 15], dim=1).reshape(-1)[: blocks * form.group]
        one = self._constant("one", torch.ones(()))
        numbers = self._node("DequantizeLinear", [self._constant("codes", codes, ir.DataType.UINT4), one])
        index = self._node("Cast", [numbers], {"to": ir.DataType.INT32.value})
        values = self._node("Gather", [self._constant("table", form.table), index], {"axis": 0})
        grid = self._node("Reshape", [values, self._shape("grid", (blocks, form.group))])
        scaled = self._node("Mul", [grid, self._constant("scales", form.scales.unsqueeze(1))])
        shape = swapped(self.weight.shape) if self.turned else self.weight.shape
        if blocks * form.group != size:
            flat = self._node("Reshape", [scaled, self._shape("flat", (-1,))])
            ends = [self._shape(name, (number,)) for name, number in (("first", 0), ("last", size))]
            scaled = self._node("Slice", [flat, *ends])
        result = self._node("Reshape", [scaled, self._shape("shape", shape)])
        if self.weight.dtype != torch.float32:
            result = self._node("Cast", [result], {"to": _type(ir, self.weight.dtype).value})
        if self.turned:
            result = self._node("Transpose", [result], {"perm": list(swapped(range(len(shape))))})
        result.shape, result.type = self.value.shape, self.value.type
        return result

    def _node(
        self,
        kind: str,
        inputs: Sequence[Any],
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
        *,
        like: Any = None,
    ) -> Any:
        """Insert a new node before the current one, and return its result."""
        attrs = [self.ir.Attr(n, _kind(self.ir, v), v) for n, v in (attributes or {}).items()]
        node = self.ir.Node(domain, kind, inputs, attrs)
        self.graph.insert_before(self.before, [node])
        result = node.outputs[0]
        if like is not None:
            result.shape, result.type = like.shape, like.type
        return result

    def _constant(self, part: str, tensor: Tensor, dtype: Any = None) -> Any:
        """Return a constant in the file, created on first use and named after the weight."""
        name = f"{self.name}_{part}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        values = tensor.detach().cpu().contiguous()
        if values.dtype == torch.bfloat16:  # numpy has no bfloat16
            array = values.view(torch.uint16).numpy().view(importlib.import_module("ml_dtypes").bfloat16)
        else:
            array = values.numpy()
        if dtype is not None and dtype == self.ir.DataType.UINT4:
            array = array.astype(importlib.import_module("ml_dtypes").uint4)
        elif dtype is not None and dtype == self.ir.DataType.INT8:
            array = array.view(np.int8)
        stored = self.ir.tensor(array, name=name)
        value = self.ir.Value(name=name, shape=stored.shape, type=self.ir.TensorType(stored.dtype), const_value=stored)
        self.graph.register_initializer(value)
        return value

    def _shape(self, part: str, sizes: Sequence[int]) -> Any:
        return self._constant(part, torch.tensor(sizes, dtype=torch.int64))

    def _replace(self, value: Any, by: Any) -> None:
        """Make every reader of a value read another one, which takes over the name if the value is an output."""
        outputs = self.graph.outputs
        if value in outputs:
            name = value.name
            value.name, by.name = f"{name}_before", name
        self.ir.convenience.replace_all_uses_with(value, by, replace_graph_outputs=True)


_STORED = ("codes", "scales", "zeros")


def block_of(group: int, width: int) -> int | None:
    """Return the largest block size with one scale per block and little row padding; None if there is none."""
    if group >= width:  # each row has one scale
        fitting = [size for size in _BLOCKS if -(-width // size) * size <= _WASTE * width]
        return fitting[0] if fitting else 16
    return next((size for size in _BLOCKS if group % size == 0), None)


def in_blocks(form: EvenSteps, block: int) -> tuple[Tensor, ...]:
    """Return the tensors that ``MatMulNBits`` reads.

    They are codes ``uint8[rows, blocks, block * bits / 8]``, scales ``float32[rows, blocks]``, and zero points
    ``uint8[rows, ceil(blocks * bits / 8)]``; the zero points are left out if they are at half of the range.
    """
    rows, width = form.codes.shape
    blocks = -(-width // block)
    codes = torch.nn.functional.pad(form.codes, (0, blocks * block - width)).reshape(rows, blocks, block)
    each = (torch.arange(blocks) * block // form.group).to(form.scales.device)
    scales = form.scales[:, each]
    zeros = None if form.zeros is None else form.zeros[:, each]
    if form.bits == 4:
        codes, zeros = halves(codes), None if zeros is None else halves(zeros)
    return (codes, scales) if zeros is None else (codes, scales, zeros)


def _number(node: Any, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _type(ir: Any, dtype: torch.dtype) -> Any:
    return {torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}[dtype]


def _kind(ir: Any, value: Any) -> Any:
    return ir.AttributeType.INTS if isinstance(value, list) else ir.AttributeType.INT
