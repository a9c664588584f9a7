"""Read values that exist only during a forward pass, without an additional graph (see `Reading`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graftc.compat.modules import is_compiled
from graftc.compiler.compilation import Compilation
from graftc.compiler.figures import Figure, SiteReading, live_readings


class Observer:
    """Reads values that forward passes compute from certain parameters.

    Values of the last pass are kept. Code compiled by `torch.compile` is not observed.
    """

    def __init__(self, compilation: Compilation) -> None:
        self._compilation = compilation
        self._observed: dict[tuple[str, str, str], Tensor] = {}

    def figures(self) -> list[Figure]:
        """Return the figures from the observed passes."""
        return [Figure(*whose, value) for whose, value in self._observed.items()]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Observe a forward pass while the block runs."""
        # Compiled code has guards on the active modes: it would be recompiled, but still could not be observed.
        if any(is_compiled(module) for module in self._compilation.store.root.modules()):
            yield
            return
        wanted: dict[int, list[SiteReading]] = {}
        for tensor, reading in live_readings(self._compilation):
            wanted.setdefault(id(tensor), []).append(reading)
        if not wanted:
            yield
            return
        with _Mode(wanted, self._observed):
            yield


class _Mode(TorchFunctionMode):
    """A mode that observes operators that read certain parameters."""

    def __init__(self, wanted: dict[int, list[SiteReading]], observed: dict[tuple[str, str, str], Tensor]) -> None:
        super().__init__()
        self._wanted, self._observed = wanted, observed

    def __torch_function__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for argument in args:
            for item in self._wanted.get(id(argument), ()):
                if operator in item.reading.operators:
                    with torch.no_grad():
                        number = item.reading.number(args, result).detach()
                    self._observed[item.adaptation, item.site, item.reading.figure] = number
        return result
