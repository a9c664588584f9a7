"""Hide the tensors of layers that the tracer is not expected to run, because each tensor slows torch.export down.

For each tensor and each input of a model, torch.export creates a fake tensor, an input and a node, whether or not
anything reads them. This takes about 8 milliseconds for a Llama layer, and twice that for the keys and values of a
cache. Which layers run is known only afterwards, so accesses to anything hidden are recorded (`Hidden.missed`); after
such an access, the capture starts again with nothing hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from graftc.compat.modules import BUFFERS, PARAMETERS
from graftc.compiler.capture.alike.modules import Layer
from graftc.passes.core.ir.past_inputs import is_past, past_place

SEEN_FIRST = 2
"""Number of layers at the start of a group that stay visible: the first runs, and the second is written out like it."""
FEWEST = 6
"""The smallest group that is worth the effort: in a smaller one, no layer becomes a call."""
_TABLES = (PARAMETERS, BUFFERS)


class Hidden:
    """Layers whose tensors are hidden while the model is traced.

    Args:
        layers: the layers, some of which are hidden.
        inputs: the model's inputs, by name.

    Attributes:
        stand_ins: for each hidden input, the visible one that is passed in its place: keys or values of another layer's
            part of the cache, of the same type.
        running: whether the model's own code is running; torch.export itself also iterates over all tables.
        missed: whether something accessed a hidden tensor.
    """

    def __init__(self, layers: Sequence[Layer], inputs: Mapping[str, Tensor]) -> None:
        groups = {id(layer.group): layer.group for layer in layers}.values()
        self._layers = [layer for group in groups if len(group) >= FEWEST for layer in group[SEEN_FIRST:-1]]
        self.stand_ins = _stand_ins({slot for layer in self._layers for slot in _slot(layer)}, inputs)
        self.running = self.missed = False

    def __len__(self) -> int:
        return len(self._layers)

    def watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the model's ``forward``, wrapped so that iteration over the tables is also recorded while it runs."""

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
        """Hide the parameters and buffers of the layers while the block runs."""
        modules = [module for layer in self._layers for module in layer.module.modules()]
        tables = [(vars(module), name, vars(module)[name]) for module in modules for name in _TABLES]
        try:
            for attributes, name, table in tables:
                attributes[name] = _HiddenTable(self, table)
            yield
        finally:
            for attributes, name, table in tables:
                attributes[name] = table


def _slot(layer: Layer) -> set[int]:
    """Return the index of a layer's part in a cache, as a set.

    The set is empty unless all integers in which the layer differs from the first one are equal.
    """
    first = layer.group[0].numbers
    own = {number for place, number in layer.numbers.items() if number != first[place]}
    return own if len(own) == 1 else set()


def _stand_ins(slots: set[int], inputs: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[Any, str] = {}
    stand_ins: dict[str, str] = {}
    for name, tensor in inputs.items():
        if is_past(name) and past_place(name)[1] in slots:
            kind, _, part = past_place(name)
            stand_in = first.setdefault((kind, part, tensor.dtype, tensor.shape), name)
            stand_ins |= {name: stand_in} if stand_in != name else {}
    return stand_ins


class _HiddenTable(MutableMapping[str, Tensor | None]):
    """An empty table that records accesses to the names in the table that it replaces."""

    def __init__(self, hidden: Hidden, table: Mapping[str, Any]) -> None:
        self._hidden, self._names = hidden, frozenset(table)
        self._tensors: dict[str, Tensor | None] = {}

    def __getitem__(self, name: str) -> Tensor | None:
        if name in self._names:
            self._hidden.missed = True
        return self._tensors[name]

    def __setitem__(self, name: str, tensor: Tensor | None) -> None:
        self._hidden.missed = True  # a tensor that is set here is lost when the table is restored
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        self._go_through()
        return iter(self._tensors)

    def __len__(self) -> int:
        self._go_through()
        return len(self._tensors)

    def _go_through(self) -> None:
        if self._names and self._hidden.running:
            self._hidden.missed = True
