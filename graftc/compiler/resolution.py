"""Define `Resolution`, the result of resolving a spec in one signature's graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from graftc.compiler.capture.anchor import Anchor
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.signature import Axis
from graftc.compiler.resolve.compose import Parts
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.roles.structure import Structure
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, Mode, Signature, Stage
from graftc.passes.core.sites.sites import AttentionSite, ParameterSite
from graftc.passes.core.weights.store import Store
from graftc.records.passes import PassRecord

Graphs = Mapping[tuple[Entry, Mode, Stage], Program]
"""The Programs of one signature."""


@dataclass(frozen=True)
class Places:
    """The places that are adapted.

    Attributes:
        resolved: the adaptations, each with its sites.
        trained: tensors that train in place.
    """

    resolved: Sequence[Resolved]
    trained: Sequence[ParameterSite]


@dataclass(frozen=True)
class Resolution:
    """The result of resolving a spec in the graphs of one signature, and how these graphs were made.

    Attributes:
        signature: the signature.
        structure: the roles in the train graph.
        resolved: the adaptations, each with its sites in these graphs.
        trained: tensors that train in place.
        attentions: every attention site.
        moded: paths of the modules whose mode makes a difference.
        axes: the inputs requested for capture.
        captures: the captures of train mode, and of eval mode if that could not be derived; each mode is captured with
            token ids, and if there are virtual tokens, also with token embeddings.
        anchors: comparisons of the source model's graphs with the model itself.
        passes: plugin passes that were applied to the graphs, with their findings.
        parts: Store names of the inserted tensors, by adaptation, site and part.
        notes: notes for display about what capturing had to change, for this signature only.
    """

    signature: Signature
    structure: Structure
    resolved: Sequence[Resolved]
    trained: Sequence[ParameterSite]
    attentions: tuple[AttentionSite, ...]
    moded: frozenset[str]
    axes: tuple[Axis, ...]
    captures: tuple[Capture, ...]
    anchors: tuple[Anchor, ...]
    passes: tuple[PassRecord, ...]
    parts: Mapping[str, Parts]
    notes: tuple[str, ...]

    @property
    def shown(self) -> dict[str, Tensor]:
        """The inputs that the caller gave as examples, by name."""
        return {axis.name: axis.shown for axis in self.axes if axis.shown is not None}

    @property
    def capture_seconds(self) -> float:
        """The time in seconds that capturing train mode took."""
        return sum(capture.seconds for capture in self.captures if capture.program.mode == "train")

    @property
    def cached(self) -> bool:
        """Whether all captures were loaded from files."""
        return all(capture.cached for capture in self.captures)

    @cached_property
    def places_as_run(self) -> Places:
        """The adapted places, in the graphs that are run."""
        return Places(self.resolved, self.trained)

    def add_constants(self, store: Store) -> None:
        """Add to a Store the tensors that the graphs use in addition to the model's, unless it already has them."""
        for capture in self.captures:
            for name, tensor in capture.constants.items():
                if name not in store:
                    store.add_constant(name, tensor.to(store.device(name.rpartition(".")[0])))


class CalledResolution(Resolution):
    """A Resolution of graphs in which equal layers call functions (`graftc.passes.core.ir.functions`).

    Attributes that describe the graphs with every layer written out are computed on first access.

    Args:
        resolution: the Resolution of the graphs with calls, which are the graphs that run.
        write_out: a function that returns the graphs with every layer written out, and their Resolution.
    """

    _write_out: Callable[[], tuple[Graphs, Resolution]]
    _graphs: Graphs

    def __init__(self, resolution: Resolution, write_out: Callable[[], tuple[Graphs, Resolution]]) -> None:
        own = {name: value for name, value in vars(resolution).items() if name not in _WRITTEN_OUT}
        vars(self).update(own, places_as_run=resolution.places_as_run, _write_out=write_out, _graphs={})

    @property
    def graphs(self) -> Graphs:
        """The graphs with every layer written out, created on first access."""
        if not self._graphs:
            with exclusive():
                if not self._graphs:  # another thread may have created them in the meantime
                    graphs, resolution = self._write_out()
                    written_out = {name: vars(resolution)[name] for name in _WRITTEN_OUT}
                    vars(self).update(written_out, _graphs=graphs, _write_out=None)
        return self._graphs

    @property
    def is_written_out(self) -> bool:
        """Whether the graphs with every layer written out have been created."""
        return bool(self._graphs)

    def __getattr__(self, name: str) -> Any:
        if name not in _WRITTEN_OUT or not self.graphs:
            raise AttributeError(name)
        return vars(self)[name]


_WRITTEN_OUT = ("structure", "resolved", "trained", "attentions")
