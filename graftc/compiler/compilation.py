"""Compilation: what was compiled, as data. What is done with one stands in files named for that: `adapting`,
`folding`, `pipeline`, `report` and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from graftc.compiler.capture.anchor import Anchor
from graftc.compiler.capture.cache import Known
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.identity.fingerprint import Identity, identify, replaced_tensors
from graftc.compiler.capture.interface import Flags, device_of, parameters
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import CACHE, CacheLayout, cache_name, probe
from graftc.compiler.capture.signature import Axis, fits, inputs_of
from graftc.compiler.resolve.compose import Parts, Unit, controls, narrow_names, units
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.roles.structure import Structure
from graftc.compiler.source_watch import SourceWatch
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, Mode, ProgramKey, Signature, Stage
from graftc.passes.core.pass_context import PassRecord
from graftc.passes.core.sites.sites import AttentionSite, ParameterSite, SiteKey
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.tensor_edits import TensorEdits
from graftc.specs.compose import CompositionSpec
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError

Graphs = Mapping[tuple[Entry, Mode, Stage], Program]
"""The Programs of one signature."""


@dataclass(frozen=True)
class Places:
    """Where adaptations are.

    Attributes:
        resolved: the adaptations with their sites.
        trained: tensors that train in place.
    """

    resolved: Sequence[Resolved]
    trained: Sequence[ParameterSite]


@dataclass(frozen=True)
class Resolution:
    """What a spec resolved to in the graphs of one signature, and how these were made.

    Attributes:
        signature: which.
        structure: the roles in the train graph.
        resolved: the adaptations with their sites there.
        trained: tensors that train in place.
        attentions: every attention.
        moded: paths of the modules whose mode makes a difference.
        axes: the inputs that capturing was asked for.
        captures: what was captured: train mode, and eval mode where it could not be derived; each with ids, and with
            token embeddings where there are virtual tokens.
        anchors: how the source model's graphs compare with the model itself.
        passes: passes of plugins that the graphs went through, with what they found.
        parts: Store names of the tensors that were inserted, by adaptation, site and part.
        notes: what capturing had to change and no other signature says, for people.
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
        """Inputs that the caller gave as examples, by name."""
        return {axis.name: axis.shown for axis in self.axes if axis.shown is not None}

    @property
    def capture_seconds(self) -> float:
        """What capturing train mode took."""
        return sum(found.seconds for found in self.captures if found.program.mode == "train")

    @property
    def cached(self) -> bool:
        """Whether what was captured came from files."""
        return all(found.cached for found in self.captures)

    @property
    def places_as_run(self) -> Places:
        """Where its graphs are adapted, as these are run."""
        return Places(self.resolved, self.trained)

    def with_notes(self, notes: tuple[str, ...]) -> Resolution:
        """The same with other notes."""
        return replace(self, notes=notes)

    def add_constants(self, store: Store) -> None:
        """Add what the graphs mention beyond the model's own tensors, where a Store does not have it yet."""
        for found in self.captures:
            for name, tensor in found.constants.items():
                if name not in store:
                    store.add_constant(name, tensor.to(store.device(name.rpartition(".")[0])))


class CalledResolution(Resolution):
    """A Resolution of graphs in which layers that are alike call functions (`graftc.passes.core.ir.functions`). What
    there is to say of graphs with every layer written out is worked out when it is first asked for.

    Args:
        found: what was found with calls; `places` keeps its sites.
    """

    places: Places
    _make: Callable[[], tuple[Graphs, Resolution]] | None
    _graphs: Graphs

    def __init__(self, found: Resolution) -> None:
        own = {name: value for name, value in vars(found).items() if name not in _WRITTEN_OUT}
        vars(self).update(own, places=Places(found.resolved, found.trained), _make=None, _graphs={})

    @property
    def places_as_run(self) -> Places:
        """See `Resolution.places_as_run`."""
        return self.places

    def with_notes(self, notes: tuple[str, ...]) -> Resolution:
        """See `Resolution.with_notes`."""
        vars(self)["notes"] = notes
        return self

    def later(self, make: Callable[[], tuple[Graphs, Resolution]]) -> None:
        """Say how the graphs with every layer written out are made, and what there is to say of them."""
        vars(self)["_make"] = make

    @property
    def graphs(self) -> Graphs:
        """The graphs with every layer written out."""
        if self._make is None:
            return self._graphs
        with exclusive():
            if self._make is not None:  # another thread may have made them meanwhile
                graphs, found = self._make()
                vars(self).update({name: vars(found)[name] for name in _WRITTEN_OUT}, _graphs=graphs, _make=None)
        return self._graphs

    @property
    def is_written_out(self) -> bool:
        """Whether they are there."""
        return self._make is None

    def __getattr__(self, name: str) -> Any:
        if name not in _WRITTEN_OUT or not self.graphs:
            raise AttributeError(name)
        return vars(self)[name]


_WRITTEN_OUT = ("structure", "resolved", "trained", "attentions")


class SignatureTable:
    """The graphs of every signature: what there is more of when a call of a new kind is compiled. It only grows.

    Attributes:
        programs: every graph; layers that are alike may call functions there.
        found: what was found in the graphs of each signature, the first one first.
        parts: the tensors of all of them.
        notes: what capturing any had to change, for people.
        first_call: inputs of the first call of the first signature, where random ones make no sense and nobody has
            shown any; None before.
    """

    def __init__(self) -> None:
        self.programs: dict[ProgramKey, Program] = {}
        self.found: dict[Signature, Resolution] = {}
        self.parts: dict[str, dict[SiteKey | None, dict[str, str]]] = {}
        self.notes: tuple[str, ...] = ()
        self.first_call: Mapping[str, Tensor] | None = None
        self._by_inputs: dict[tuple[str, ...], list[Signature]] = {}

    def add(self, graphs: Graphs, found: Resolution) -> None:
        """Take in the graphs of a new signature. Threads that look signatures up meanwhile find it when it is whole."""
        signature = found.signature
        self.programs |= {ProgramKey(entry, mode, signature, stage): p for (entry, mode, stage), p in graphs.items()}
        self.found[signature] = found
        for owner, sites in found.parts.items():
            self.parts.setdefault(owner, {}).update(sites)
        self.notes += tuple(note for note in found.notes if note not in self.notes)
        self._by_inputs.setdefault(signature.inputs, []).append(signature)

    def find(self, inputs: Mapping[str, Any]) -> Signature | None:
        """The signature whose Programs hold for a call's tensors and flags; None where there is none yet."""
        for signature in self._by_inputs.get(inputs_of(inputs), ()):
            if fits(self.programs[ProgramKey("forward", "train", signature)].inputs, inputs):
                return signature
        return None


@dataclass(frozen=True, eq=False)
class Compilation:
    """All Programs of one spec and model over one Store. It is frozen: what a new kind of call adds is in its table.

    Attributes:
        spec: what was asked for.
        model: the source model; read when a new signature has to be captured, never changed.
        store: every tensor.
        source: the model as it was given; `model` is a copy where the spec unties tensors or adds tokens.
        watch: whether `source` is what it was.
        seed: what initial values were drawn from.
        use_cache: whether captures are looked up and kept in the user's cache folder.
        known: captures that are there already, by their key; None of one whose file has gone since.
        table: the graphs of every signature.
        every_layer: every layer is written out in all of them.
        in_the_way: why a model is not one graph, by the path of a stack of layers, and of the whole under the empty
            path; not kept in artifacts.
    """

    spec: Spec
    model: nn.Module
    store: Store
    source: nn.Module
    watch: SourceWatch = field(repr=False)
    seed: int = 0
    use_cache: bool = True
    known: Known = field(default_factory=dict, repr=False)
    table: SignatureTable = field(default_factory=SignatureTable, repr=False)
    every_layer: bool = False
    in_the_way: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def programs(self) -> Mapping[ProgramKey, Program]:
        """Every graph, with all layers written out."""
        return {key: self._written_out(key) for key in self.table.programs}

    def _written_out(self, key: ProgramKey) -> Program:
        found = self.signatures[key.signature]
        if isinstance(found, CalledResolution) and isinstance(key.mode, str):
            return found.graphs.get((key.entry, key.mode, key.stage)) or self.table.programs[key]
        return self.table.programs[key]

    @property
    def signatures(self) -> Mapping[Signature, Resolution]:
        """What was found in the graphs of each signature, the first one first."""
        return self.table.found

    @property
    def parts(self) -> Mapping[str, Parts]:
        """The tensors of every adaptation, by site and part."""
        return self.table.parts

    @property
    def notes(self) -> tuple[str, ...]:
        """What capturing had to change, for people."""
        return self.table.notes

    @property
    def main(self) -> Resolution:
        """What was found for the signature that was compiled first."""
        return next(iter(self.signatures.values()))

    def key(
        self,
        mode: Mode,
        stage: Stage = "adapted",
        signature: Signature | None = None,
        *,
        entry: Entry = "forward",
    ) -> ProgramKey:
        """The key of a Program, by default of the first signature's."""
        return ProgramKey(entry, mode, self.main.signature if signature is None else signature, stage)

    @property
    def flags(self) -> Flags:
        """The flags of the calls that were compiled first."""
        return self.program_as_run("train", "base").flags

    def captures(self) -> Known:
        """Return the captures in use, by key, so that another Compilation can reuse them."""
        in_use = (capture for resolution in self.signatures.values() for capture in resolution.captures)
        return {**self.known, **{capture.key: capture.again for capture in in_use if capture.key is not None}}

    def program(self, mode: Mode, stage: Stage = "adapted", signature: Signature | None = None) -> Program:
        """A Program that every signature has; by default one of the first signature."""
        return self._written_out(self.key(mode, stage, signature))

    def written_out(self, key: ProgramKey) -> Program | None:
        """The Program of a key with all layers written out; None where there is none."""
        return self._written_out(key) if key in self.table.programs else None

    def program_as_run(self, mode: Mode, stage: Stage = "adapted", signature: Signature | None = None) -> Program:
        """`program`, in which layers that are alike may call functions."""
        return self.table.programs[self.key(mode, stage, signature)]

    def places(self) -> Places:
        """Where the first signature's graphs are adapted, as these are run."""
        return self.main.places_as_run

    def find(self, inputs: Mapping[str, Any]) -> Signature | None:
        """The signature whose Programs hold for a call's tensors and flags; None where there is none yet."""
        return self.table.find(inputs)

    def graphs(self, signature: Signature) -> dict[str, Program]:
        """The graphs of a signature by the names that they have in files: ``train`` and ``eval``, the base's
        ``base.train`` and ``base.eval``, and what was captured for these where there are virtual tokens:
        ``tokens.train``, ``embeds.train``, and those of eval mode where it could not be derived."""
        stages: tuple[tuple[str, Stage], ...] = (("base.", "base"), ("", "adapted"))
        modes: tuple[Mode, ...] = ("train", "eval")
        named = {f"{prefix}{mode}": self.program(mode, stage, signature) for prefix, stage in stages for mode in modes}
        for found in self.signatures[signature].captures:
            if not any(found.program is program for program in named.values()):
                mode = found.program.mode
                entry = "tokens" if found.program is self.program(mode, "source", signature) else "embeds"
                named[f"{entry}.{mode}"] = found.program
        return named

    @cached_property
    def cache_layout(self) -> CacheLayout:
        """What the source model's cache holds.

        Raises:
            GraftError: GC140 where it keeps no cache of keys and values.
        """
        device = device_of(self.model)
        name = cache_name(parameters(self.model)) or CACHE
        try:  # a single token takes half the time of a few
            return probe(self.model, {axis.name: axis.smallest(device) for axis in self.main.axes}, name)
        except GraftError:
            return probe(self.model, {axis.name: axis.example(device) for axis in self.main.axes}, name)

    @cached_property
    def keeps_cache(self) -> bool:
        """Whether the source model keeps a cache of keys and values."""
        try:
            return bool(self.cache_layout.heads)
        except GraftError:
            return False

    @property
    def known_to_keep_cache(self) -> bool | None:
        """The same, where the model has been asked for it."""
        return vars(self).get("keeps_cache")

    @property
    def known_cache_layout(self) -> CacheLayout | None:
        """The same, where the model has been asked for it."""
        return vars(self).get("cache_layout")

    @property
    def tensor_edits(self) -> TensorEdits:
        """What every adaptation does with which rows of a stored tensor; the same in all signatures."""
        return self.program_as_run("train").tensor_edits

    @property
    def replaced(self) -> frozenset[str]:
        """Tensors of `source` whose values nothing here depends on: graphs have their own of them."""
        return replaced_tensors(
            self.store.updated, self.tensor_edits.trained_in_full(), Store.mirror(self.source).aliases
        )

    def identity(self, *, full: bool = False) -> Identity:
        """The identity of the base: of the source model, whatever values it has of what is `replaced`.

        Args:
            full: digest every value instead of some of each tensor.
        """
        return identify(self.source, full=full, replaced=self.replaced)

    @cached_property
    def controls(self) -> Mapping[str, CompositionSpec]:
        """Inputs beside the source model's, by which a call chooses among adaptations."""
        return controls(self.spec)

    @cached_property
    def narrow(self) -> frozenset[str]:
        """Names of adaptations and compositions whose tensors are kept in the base's element type."""
        return narrow_names(self.spec)

    @cached_property
    def units(self) -> list[Unit]:
        """The adaptations as they are inserted: compositions, and single ones."""
        return units(self.spec, self.main.resolved)

    @cached_property
    def unit_of(self) -> dict[str, Unit]:
        """The same by name."""
        return {unit.name: unit for unit in self.units}
