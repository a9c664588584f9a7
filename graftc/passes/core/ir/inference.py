"""Infer a call's fake value from the shapes and dtypes of its arguments."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from graftc.compat.fake_tensors import enable_python_dispatcher
from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.program import Program, map_nodes
from graftc.passes.core.ir.shapes import fake_mode_of, types_of


class Inference:
    """Computes nodes' values in a Program's fake tensor mode; instances for the same mode share their results.

    Args:
        program: the Program whose values the calls read.

    Attributes:
        fake: the Program's fake tensor mode.
    """

    def __init__(self, program: Program) -> None:
        self.fake = fake_mode_of(program)
        # Stored on the mode to which the values belong, since every adaptation has its own Inference.
        self._known: dict[Any, Any] = vars(self.fake).setdefault("_graftc_known", {})
        values = (node.meta["val"] for node in program.placeholders())
        self._device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return the fake value of a call to an operator, given its arguments as nodes and literals."""
        key = (target, self._device, types_of(args), types_of(kwargs))
        if key not in self._known:
            inputs, options = map_nodes((args, dict(kwargs)), lambda n: n.meta["val"])
            if takes_device(target):
                options = {"device": self._device, **options}
            # Some operators expand to symbolic sizes only with their Python decompositions.
            with enable_python_dispatcher(), self.fake:
                self._known[key] = target(*inputs, **options)
        return self._known[key]

    def tensor(self, like: Tensor) -> Tensor:
        """Return a fake tensor with the shape, dtype and device of a Store tensor."""
        key = ("tensor", like.dtype, tuple(like.shape), like.device)
        if key not in self._known:
            with self.fake:
                self._known[key] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        return cast("Tensor", self._known[key])
