"""Define `Compilation`, the results of compiling as data; modules such as `adapting` contain the operations on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from graftc.compat.caches import cache_name
from graftc.compiler.capture.capture_cache import Known
from graftc.compiler.capture.identity.fingerprint import Identity, identify, replaced_tensors
from graftc.compiler.capture.interface import Flags, device_of, parameters
from graftc.compiler.capture.past import CACHE, CacheLayout, probe
from graftc.compiler.capture.signature import fits, inputs_of
from graftc.compiler.resolution import CalledResolution, Graphs, Places, Resolution
from graftc.compiler.resolve.compose import Control, Parts, Unit, controls, narrow_names, units
from graftc.compiler.source_watch import SourceWatch
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Entry, Mode, ProgramKey, Signature, Stage
from graftc.passes.core.sites.sites import SiteKey
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.tensor_edits import TensorEdits
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True, eq=False)
class StoredSignature:
    """A signature in an artifact.

    Attributes:
        inputs: the result of `inputs_of` for its calls, without choices among adaptations.
        compile: a function that adds the signature to a Compilation.
    """

    inputs: tuple[str, ...]
    compile: Callable[[Compilation], None]


class SignatureTable:
    """The graphs of every signature; entries are only ever added, when a new kind of call is compiled.

    Attributes:
        programs: every graph; equal layers in a graph may be function calls.
        resolutions: the Resolution of each signature, in the order of compilation.
        parts: Store names of the tensors inserted for all signatures, by adaptation, site and part.
        notes: notes for display about what capturing had to change, for all signatures.
        first_call: the inputs of the first call with the first signature, recorded if random inputs make no sense and
            the caller gave no examples; None before that call.
        stored: the signatures of an artifact that no call has needed yet, in the artifact's order.
    """

    def __init__(self) -> None:
        self.programs: dict[ProgramKey, Program] = {}
        self.resolutions: dict[Signature, Resolution] = {}
        self.parts: dict[str, dict[SiteKey | None, dict[str, str]]] = {}
        self.notes: tuple[str, ...] = ()
        self.first_call: Mapping[str, Tensor] | None = None
        self.stored: list[StoredSignature] = []
        self._by_inputs: dict[tuple[str, ...], list[Signature]] = {}

    def add(self, graphs: Graphs, resolution: Resolution, notes: Iterable[str]) -> None:
        """Add a new signature's graphs and notes; other threads find the signature only once it is complete."""
        signature = resolution.signature
        self.programs |= {ProgramKey(entry, mode, signature, stage): p for (entry, mode, stage), p in graphs.items()}
        self.resolutions[signature] = resolution
        for owner, sites in resolution.parts.items():
            self.parts.setdefault(owner, {}).update(sites)
        self.notes += tuple(note for note in notes if note not in self.notes)
        self._by_inputs.setdefault(signature.inputs, []).append(signature)

    def remove(self, signature: Signature) -> None:
        """Remove a signature that no call has used."""
        self.programs = {key: program for key, program in self.programs.items() if key.signature != signature}
        del self.resolutions[signature]
        self._by_inputs[signature.inputs].remove(signature)

    def find(self, inputs: Mapping[str, Any]) -> Signature | None:
        """Return the signature whose Programs apply to a call's tensors and flags; None if there is none yet."""
        for signature in self._by_inputs.get(inputs_of(inputs), ()):
            if fits(self.programs[ProgramKey("forward", "train", signature)].inputs, inputs):
                return signature
        return None


@dataclass(frozen=True, eq=False)
class Compilation:
    """All Programs of one spec and model over one Store; frozen, except that each new kind of call adds to its table.

    Attributes:
        spec: the spec that was requested.
        model: the source model; read when a new signature has to be captured, never changed.
        store: the Store that contains every tensor.
        source: the model as it was given; `model` is a copy if the spec unties tensors or adds tokens.
        watch: detects changes to `source`.
        seed: the seed for drawing initial values.
        use_cache: whether captures are looked up and stored in the user's cache folder.
        known: functions that return existing captures, by key; they return None if the file has since been removed.
        table: the graphs of every signature.
        every_layer: whether every layer is written out in all graphs of the table.
        whole: the model that `model` is the union of elements of, whose own Python runs; None if `model` is one graph.
        in_the_way: the reasons why the model is not one graph, by the path of the stack of layers concerned; the reason
            for the whole model is under the empty path. Not stored in artifacts.
        codes_chosen_before: names of packed weights whose codes had been chosen by an adaptation before this
            Compilation was made from another one.
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
    whole: nn.Module | None = field(default=None, repr=False)
    in_the_way: Mapping[str, str] = field(default_factory=dict, repr=False)
    codes_chosen_before: frozenset[str] = frozenset()

    @property
    def programs(self) -> Mapping[ProgramKey, Program]:
        """Every graph, with all layers written out."""
        return {key: self._written_out(key) for key in self.table.programs}

    def _written_out(self, key: ProgramKey) -> Program:
        resolution = self.signatures[key.signature]
        if isinstance(resolution, CalledResolution) and isinstance(key.mode, str):
            return resolution.graphs.get((key.entry, key.mode, key.stage)) or self.table.programs[key]
        return self.table.programs[key]

    @property
    def signatures(self) -> Mapping[Signature, Resolution]:
        """The Resolution of each signature, in the order of compilation, without those that are only stored so far."""
        return self.table.resolutions

    @property
    def parts(self) -> Mapping[str, Parts]:
        """Store names of the inserted tensors, by adaptation, site and part."""
        return self.table.parts

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for display about what capturing had to change."""
        return self.table.notes

    @property
    def main(self) -> Resolution:
        """The Resolution of the signature that was compiled first."""
        return next(iter(self.signatures.values()))

    def key(
        self, mode: Mode, stage: Stage = "adapted", signature: Signature | None = None, *, entry: Entry = "forward"
    ) -> ProgramKey:
        """Return the key of a Program, by default for the first signature."""
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
        """Return a Program of a signature's forward pass, by default the first signature's."""
        return self._written_out(self.key(mode, stage, signature))

    def written_out(self, key: ProgramKey) -> Program | None:
        """Return the Program of a key with all layers written out; None if there is none."""
        return self._written_out(key) if key in self.table.programs else None

    def program_as_run(self, mode: Mode, stage: Stage = "adapted", signature: Signature | None = None) -> Program:
        """Return the same Program as `program`, except that equal layers may be function calls."""
        return self.table.programs[self.key(mode, stage, signature)]

    def places(self) -> Places:
        """Return the places where the first signature is adapted, in the graphs that are run."""
        return self.main.places_as_run

    def find(self, inputs: Mapping[str, Any]) -> Signature | None:
        """Return the signature whose Programs apply to a call's tensors and flags; None if there is none yet."""
        return self.table.find(inputs)

    def graphs(self, signature: Signature) -> dict[str, Program]:
        """Return a signature's graphs, keyed by their names in files.

        These are ``train``, ``eval``, ``base.train`` and ``base.eval``; if there are virtual tokens, or if eval mode
        could not be derived, also the captures behind them, such as ``tokens.train`` and ``embeds.train``.
        """
        stages: tuple[tuple[str, Stage], ...] = (("base.", "base"), ("", "adapted"))
        modes: tuple[Mode, ...] = ("train", "eval")
        named = {f"{prefix}{mode}": self.program(mode, stage, signature) for prefix, stage in stages for mode in modes}
        for capture in self.signatures[signature].captures:
            if not any(capture.program is program for program in named.values()):
                mode = capture.program.mode
                entry = "tokens" if capture.program is self.program(mode, "source", signature) else "embeds"
                named[f"{entry}.{mode}"] = capture.program
        return named

    @cached_property
    def cache_layout(self) -> CacheLayout:
        """The layout of the source model's cache.

        Raises:
            GraftError: GC140 if the model keeps no cache of keys and values.
        """
        device = device_of(self.model)
        name = cache_name(parameters(self.model)) or CACHE
        try:  # probing with a single token takes half as long as with several
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
        """The value of `keeps_cache` if it has been computed, otherwise None."""
        return vars(self).get("keeps_cache")

    @property
    def known_cache_layout(self) -> CacheLayout | None:
        """The value of `cache_layout` if it has been computed, otherwise None."""
        return vars(self).get("cache_layout")

    @property
    def tensor_edits(self) -> TensorEdits:
        """The changes that every adaptation makes to rows of stored tensors; the same in all signatures."""
        return self.program_as_run("train").tensor_edits

    @property
    def replaced(self) -> frozenset[str]:
        """The tensors of `source` whose values have no effect here, because the graphs use their own values."""
        aliases = Store.mirror(self.source).aliases
        trained = self.tensor_edits.trained_in_full()
        return self.chosen_codes | replaced_tensors(self.store.updated, trained, aliases)

    @property
    def chosen_codes(self) -> frozenset[str]:
        """The names of the packed parts of weights whose codes follow from an adaptation's tensors."""
        names = self.tensor_edits.requantised()
        return frozenset(part for name in names for part in self.store.parts_of(name))

    @property
    def requantised(self) -> frozenset[str]:
        """The names of packed weights whose codes are not the base's own, but were chosen by an adaptation."""
        names = self.codes_chosen_before | self.tensor_edits.requantised()
        return names & self.store.packed.keys()

    def identity(self, *, full: bool = False) -> Identity:
        """Return the identity of the base: that of the source model, ignoring the values of its `replaced` tensors.

        Args:
            full: whether to digest every value of each tensor instead of a sample.
        """
        return identify(self.source, full=full, replaced=self.replaced)

    @cached_property
    def controls(self) -> Mapping[str, Control]:
        """The additional inputs with which a call chooses among adaptations, or where they act."""
        return controls(self.spec)

    @cached_property
    def narrow(self) -> frozenset[str]:
        """The names of adaptations and compositions whose tensors are stored in the base's dtype."""
        return narrow_names(self.spec)

    @cached_property
    def units(self) -> list[Unit]:
        """The units in which adaptations are inserted: compositions and single adaptations."""
        return units(self.spec, self.main.resolved)

    @cached_property
    def unit_of(self) -> dict[str, Unit]:
        """The units by name."""
        return {unit.name: unit for unit in self.units}
