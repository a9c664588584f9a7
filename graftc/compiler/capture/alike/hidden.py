"""Hide tensors of layers that the tracer is not expected to run: torch.export pays for every tensor of a model, and for
every input.

It makes a stand-in, an input and a node for each of them, about 8 milliseconds for a layer of a Llama, whether or not
anything reads it, and twice that for keys and values of a cache. Which layers run is known only afterwards, so every
look at something hidden is noticed, and the capture starts again with everything in sight (`Hidden.missed`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from graftc.compiler.capture.alike.modules import Layer
from graftc.passes.core.ir.past_inputs import is_past, past_place

SEEN_FIRST = 2
"""How many layers at the front of a group stay in sight: the first runs, and the second is written out like it."""
FEWEST = 6
"""Layers of a group, from which on it pays: of fewer, none is a call."""
_TABLES = ("_parameters", "_buffers")


class Hidden:
    """Layers whose tensors are out of sight while the model is traced.

    Args:
        layers: of which some are hidden.
        inputs: what the model is called with, by name.

    Attributes:
        stand_ins: for inputs that are out of sight, the one that is there in their place: keys or values of another
            layer's part of the cache, of the same type.
        running: whether the model's own code runs: torch.export goes through all tables by itself.
        missed: whether something looked for one of the tensors.
    """

    def __init__(self, layers: Sequence[Layer], inputs: Mapping[str, Tensor]) -> None:
        groups = {id(layer.group): layer.group for layer in layers}.values()
        self._layers = [layer for group in groups if len(group) >= FEWEST for layer in group[SEEN_FIRST:-1]]
        self.stand_ins = _stand_ins({slot for layer in self._layers for slot in _slot(layer)}, inputs)
        self.running = self.missed = False

    def __len__(self) -> int:
        return len(self._layers)

    def note_miss(self) -> None:
        """Something looked for a tensor that is hidden."""
        self.missed = True

    def watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The model's forward, inside of which even going through the tables is noticed."""

        @functools.wraps(forward)
        def watching(*args: Any, **kwargs: Any) -> Any:
            self.running = True
            try:
                return forward(*args, **kwargs)
            finally:
                self.running = False

        return watching

    @contextmanager
    def out_of_sight(self) -> Iterator[None]:
        """Inside, the layers have no parameters and no buffers; afterwards they have the same as before."""
        modules = [module for layer in self._layers for module in layer.module.modules()]
        tables = [(vars(module), name, vars(module)[name]) for module in modules for name in _TABLES]
        try:
            for held, name, table in tables:
                held[name] = _HiddenTable(self, table)
            yield
        finally:
            for held, name, table in tables:
                held[name] = table


def _slot(layer: Layer) -> set[int]:
    """The place of a layer's part of a cache, where all numbers in which it differs from the first one say the same."""
    first = layer.group[0].numbers
    own = {number for place, number in layer.numbers.items() if number != first[place]}
    return own if len(own) == 1 else set()


def _stand_ins(slots: set[int], inputs: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, tensor in inputs.items():
        if is_past(name) and past_place(name)[1] in slots:
            kind, _, part = past_place(name)
            there = first.setdefault((kind, part, tensor.dtype, tensor.shape), name)
            found |= {name: there} if there != name else {}
    return found


class _HiddenTable(dict[str, Tensor | None]):
    """An empty table that notices who looks for one of the names that it had."""

    def __init__(self, hidden: Hidden, table: Mapping[str, Any]) -> None:
        super().__init__()
        self._hidden, self._names = hidden, frozenset(table)

    def __contains__(self, name: object) -> bool:
        self._look(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Tensor | None:
        self._look(name)
        return super().__getitem__(name)

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        self._hidden.note_miss()  # what is put here is lost when the tensors come back
        super().__setitem__(name, tensor)

    def get(self, name: str, default: Any = None) -> Any:
        """The default; that somebody asked is noticed."""
        self._look(name)
        return super().get(name, default)

    def __iter__(self) -> Iterator[str]:
        self._go_through()
        return super().__iter__()

    def __len__(self) -> int:
        self._go_through()
        return super().__len__()

    def keys(self) -> Any:
        """None; that somebody asked is noticed, as for the rest."""
        self._go_through()
        return super().keys()

    def values(self) -> Any:
        """None."""
        self._go_through()
        return super().values()

    def items(self) -> Any:
        """None."""
        self._go_through()
        return super().items()

    def _look(self, name: object) -> None:
        if name in self._names:
            self._hidden.note_miss()

    def _go_through(self) -> None:
        if self._names and self._hidden.running:
            self._hidden.note_miss()
