"""What a call gives, from the types of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.program import Program, map_nodes
from graftc.passes.core.ir.shapes import fake_mode_of, types_of


class Inference:
    """Works out the values of nodes in the fake mode of a Program, equal types once for all that it is made for there.

    Args:
        program: whose values the calls read.

    Attributes:
        fake: its fake mode.
    """

    def __init__(self, program: Program) -> None:
        self.fake = fake_mode_of(program)
        # With the mode, whose values these are: every adaptation has an Inference of its own.
        self._known: dict[Any, Any] = vars(self.fake).setdefault("_graftc_known", {})
        values = (node.meta["val"] for node in program.placeholders())
        self._device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The value of a call of an operator with nodes and literals."""
        key = (target, self._device, types_of(args), types_of(kwargs))
        if key not in self._known:
            # Some operators expand to symbolic sizes with their Python decompositions only.
            with enable_python_dispatcher(), self.fake:
                inputs, options = map_nodes((args, dict(kwargs)), lambda n: n.meta["val"])
                if takes_device(target):
                    options = {"device": self._device, **options}
                self._known[key] = target(*inputs, **options)
        return self._known[key]

    def tensor(self, like: Tensor) -> Tensor:
        """A value of the type of a tensor of the Store."""
        key = ("tensor", like.dtype, tuple(like.shape), like.device)
        if key not in self._known:
            with self.fake:
                self._known[key] = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        found: Tensor = self._known[key]
        return found
