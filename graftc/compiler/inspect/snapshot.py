"""Represent a Compilation as data: places, tensors and Programs, alike for a live model and an artifact on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from graftc.compat.modules import transient_of
from graftc.compiler.compilation import Compilation
from graftc.compiler.resolve.resolver import place_of
from graftc.compiler.resolve.slots import NAMES
from graftc.compiler.roles.findings import Structure
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.ir.shapes import DTYPE_NAMES, DTYPES
from graftc.passes.core.sites.sites import LinearSite, Site, SiteKey
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.sharding import gathered
from graftc.passes.core.weights.store import Store
from graftc.records.passes import PassRecord
from graftc.records.places import AdaptedPlace, TrainedCopy
from graftc.records.roles import Finding
from graftc.specs.document import Spec


@dataclass(frozen=True)
class TensorRecord:
    """A description of a tensor without its values.

    Attributes:
        dtype: the dtype, such as ``"f32"``.
        shape: the shape.
        trainable: whether it trains.
        parameter: whether it is a parameter, trainable or not, as opposed to a buffer.
    """

    dtype: str
    shape: tuple[int, ...]
    trainable: bool = False
    parameter: bool = True

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRecord:
        """Return the record of a tensor."""
        dtype = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        parameter = isinstance(tensor, nn.Parameter)
        return cls(dtype, tuple(tensor.shape), parameter and tensor.requires_grad, parameter)

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """The number of bytes; a dtype without a name in graphs counts as one byte per element."""
        return self.numel * DTYPES.get(self.dtype, torch.uint8).itemsize


@dataclass(frozen=True)
class Snapshot:
    """A Compilation as data.

    Attributes:
        model: name of the source model's class.
        spec: the spec from which it was compiled.
        sites: every adapted place, in the order of the spec's adaptations.
        trained: the base tensors that train.
        base: the base's tensors, in the source model's order; tied tensors are listed under the name that owns them.
        aliases: for each tied name, the name that owns the tensor.
        adapters: the tensors that graftc added.
        passes: the plugins' passes that were applied to the graphs.
        read: returns the first signature's Program in a mode, adapted or the base's own.
    """

    model: str
    spec: Spec
    sites: tuple[AdaptedPlace, ...]
    trained: tuple[TrainedCopy, ...]
    base: Mapping[str, TensorRecord]
    aliases: Mapping[str, str]
    adapters: Mapping[str, TensorRecord]
    passes: tuple[PassRecord, ...]
    read: Callable[[Mode, bool], Program]

    def program(self, mode: Mode = "eval", *, base: bool = False) -> Program:
        """Return the first signature's Program, adapted or the base's own."""
        return self.read(mode, base)


def snapshot(compilation: Compilation) -> Snapshot:
    """Return a live Compilation as data."""
    store = compilation.store
    return Snapshot(
        type(compilation.model).__name__,
        compilation.spec,
        tuple(site_records(compilation)),
        tuple(TrainedCopy(e.owner, e.own.tensor, e.own.rows, e.trained) for e in compilation.tensor_edits.copies()),
        {name: TensorRecord.of(t) for name, t in store.base() if name not in store.constants},
        dict(store.aliases),
        {name: TensorRecord.of(t) for name, t in adapter_tensors(store) if name not in store.updated},
        compilation.main.passes,
        lambda mode, base: compilation.program(mode, "base" if base else "adapted"),
    )


def base_snapshot(model: nn.Module, program: Program, store: Store) -> Snapshot:
    """Return an unadapted model as data.

    Args:
        model: the model.
        program: the model's graph in train mode.
        store: the model's tensors.
    """

    @cache
    def read(mode: Mode, base: bool) -> Program:
        return program if mode == "train" else to_eval(program)

    base = {name: TensorRecord.of(tensor) for name, tensor in store.base() if name not in store.constants}
    spec = Spec(adapt=())
    return Snapshot(type(model).__name__, spec, (), (), base, dict(store.aliases), {}, (), read)


def adapter_tensors(store: Store) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that must be stored in addition to the base.

    These are the parameters (including frozen ones) and persistent buffers that graftc added, and the base tensors that
    graphs update.
    """
    for name, tensor in store.adapters():
        path, _, last = name.rpartition(".")
        if isinstance(tensor, nn.Parameter) or last not in transient_of(store.owner(path)):
            yield name, tensor
    for name in store.updated:
        yield name, store.get(name)


def adapter_tensors_now(store: Store, device: torch.device | None = None) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over `adapter_tensors` as they are now: with copies of those that other threads may change.

    Args:
        store: the Store.
        device: the device for the copies; by default, where the tensors are.
    """
    copies = slot_copies(store, device)
    return ((name, copies.get(name, tensor)) for name, tensor in adapter_tensors(store))


def slot_copies(store: Store, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return copies from one moment of the tensors of banks whose adapters come and go, by name.

    Args:
        store: the Store.
        device: the device for the copies; by default, where the tensors are.
    """
    banks = {owner_of(name) for name, _ in store.adapters() if name.rpartition(".")[2] == NAMES}
    if not banks:
        return {}
    with store.changes.still():
        return {name: _copy(t, device) for name, t in adapter_tensors(store) if owner_of(name) in banks}


def _copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    own = tensor.detach()
    own = own.clone() if device is None or own.is_meta else own.to(device, copy=True)
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


def adapter_values(store: Store) -> Iterator[tuple[str, Tensor]]:
    """Return an iterator over `adapter_tensors_now` with detached full values, even of tensors that are sharded."""
    return ((name, gathered(tensor)) for name, tensor in adapter_tensors_now(store))


def site_records(compilation: Compilation) -> Iterator[AdaptedPlace]:
    """Yield the records of the adapted places."""
    for resolved in compilation.main.resolved:
        uses: dict[SiteKey, int] = {}
        for site, _ in resolved.sites:
            uses[place_of(site)] = uses.get(place_of(site), 0) + 1
        for site, _ in resolved.places:
            yield _record(compilation, resolved.name, resolved.spec.method, site, uses[place_of(site)])
    for unit in compilation.units:
        if unit.composition is not None:
            own = compilation.parts.get(unit.name, {})
            for site in {s.key: s for member in unit.members for s, _ in member.places if s.key in own}.values():
                yield _record(compilation, unit.name, unit.composition.kind, site, 1)


def _record(compilation: Compilation, name: str, method: str, site: Site, uses: int) -> AdaptedPlace:
    key = site.key
    return AdaptedPlace(
        adaptation=name,
        method=method,
        module=key.module,
        name=key.name,
        part=key.part,
        use=key.use,
        kind=str(site.kind),
        roles=site.roles,
        layer=site.layer,
        stack=site.stack,
        rows=site.own.rows if isinstance(site, LinearSite) else None,
        uses=uses,
        evidence=_evidence(compilation.main.structure, site),
        tensors=dict(compilation.parts.get(name, {}).get(key, {})),
    )


def _evidence(structure: Structure, site: Site) -> str:
    node = site.use.node if isinstance(site, LinearSite) else getattr(site, "node", None)
    findings = (f for f in structure.findings if f.role in site.roles and f.node is node and _same_rows(f, site))
    return next((f.evidence for f in findings), "")


def _same_rows(finding: Finding, site: Site) -> bool:
    if not isinstance(site, LinearSite) or finding.rows is None:
        return True
    return site.own.at(finding.rows) == site.own
