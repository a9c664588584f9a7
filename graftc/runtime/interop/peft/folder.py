"""A folder that peft wrote, as data: the adapted modules, their specs, and their tensors by graftc's part names.

No model is needed or built; tensors are read on demand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.files.tensors.writing import FLOATING
from graftc.runtime.interop.peft.forms import INTEGERS, Shaped, filled, to_ours
from graftc.runtime.interop.peft.keys import Keys, parse
from graftc.runtime.interop.peft.parameters import adapted_parameters
from graftc.runtime.interop.peft.targets import is_saved
from graftc.runtime.sources.folder_kinds import missing, reader_of
from graftc.specs.base import MethodSpec
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import some
from graftc.specs.foreign.config import CONFIG, AdapterConfig, config_bytes, read_config
from graftc.specs.foreign.fields import is_listed, method_at, rows_of, table_rows, takes_bias

WEIGHTS = "adapter_model.safetensors"
ADDED = 2
"""How many times peft adds the output projection's update in an adapted `nn.MultiheadAttention`: once when it merges
the attention module for a call, and again when that in turn merges the projection."""
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin")


@dataclass(frozen=True)
class PeftModule:
    """An adapted module and, if there is a checkpoint, its contents there.

    Attributes:
        path: path of the module in the base.
        parameter: the adapted parameter: the one that `target_parameters` names, or otherwise the module's weight.
        spec: the adaptation, with the rank, the scaling and the other values that apply to this module.
        keys: keys of the module's tensors, by graftc's part names.
        shaped: properties that determine how its tensors are stored.
        depth: number of other adapters that wrap this one at the same module in the file.
        named: whether the config names the parameter in `target_parameters` rather than the module in `target_modules`.
        around: path of the adapted `nn.MultiheadAttention` that contains this module, which peft adapts along with it.
        read_at: the module through which the base reads the tensor, if that is another module that shares it.
    """

    path: str
    parameter: str
    spec: MethodSpec
    keys: Mapping[str, str] = field(default_factory=dict)
    shaped: Shaped = field(default_factory=Shaped)
    depth: int = 0
    named: bool = False
    read_at: str = ""
    around: str = ""

    @property
    def name(self) -> str:
        """The name of the adapted tensor in the base."""
        return f"{self.path}.{self.parameter}"

    @property
    def target(self) -> str:
        """The name by which a target selects the module: its own, or a named parameter's if that is not the weight."""
        return self.name if self.named and self.parameter != "weight" else self.read_at or self.path


@dataclass(frozen=True)
class PeftAdapter:
    """One adapter of a peft folder.

    Attributes:
        folder: path of the folder.
        config: the contents of ``adapter_config.json``.
        keys: the parsed keys of its tensors.
        file: the file with its tensors.
        modules: the adapted modules, in the file's order: the method's own modules, then trained rows of tables.
        doubles: pairs of keys whose tensors must be equal; the first one is used.
    """

    folder: Path
    config: AdapterConfig
    keys: Keys
    file: TensorFolder
    modules: tuple[PeftModule, ...]
    doubles: tuple[tuple[str, str], ...] = ()

    @property
    def place(self) -> Place:
        """The file with the tensors, for errors."""
        return Place(str(self.folder / WEIGHTS))

    def in_config(self, field: str) -> Place:
        """Return a config field as a place, for errors."""
        return Place(str(self.folder / CONFIG), path=field)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of its tensors as stored, by key."""
        return {key: stored.shape for key, stored in self.file.entries.items()}

    @cached_property
    def trained(self) -> Mapping[str, str]:
        """The keys of tensors that replace the base's as a whole, by the base's names.

        These tensors belong to modules that are trained in full, or are biases.
        """
        return {name: key for name, key in self.keys.plain.items() if self._trains(name)}

    @cached_property
    def copies(self) -> Mapping[str, str]:
        """The keys of base tensors that were saved along with the adapter, by the base's names.

        These tensors must be equal to the base's: peft saves embeddings that are adapted, and those whose vocabulary
        was resized.
        """
        return {name: key for name, key in self.keys.plain.items() if name not in self.trained}

    def _trains(self, name: str) -> bool:
        module, _, last = name.rpartition(".")
        if any(is_saved(self.config, path) for path in _ancestors(module)):
            return True
        return last == "bias" and takes_bias(self.config, {m.path for m in self.modules}, module)

    def tensor(self, key: str) -> Tensor:
        """Read a tensor from the file, as stored.

        Raises:
            GraftError: GC113 for a file that has changed or is damaged.
        """
        return self.file[key]

    def tensors(self, module: PeftModule) -> dict[str, Tensor]:
        """Return a module's tensors by graftc's part names, in graftc's form and in the stored dtype.

        Raises:
            GraftError: GC113 for shapes that do not fit the method.
        """
        tensors: dict[str, Tensor] = {}
        table = type(module.spec).peft
        assert table is not None
        for part, key in module.keys.items():
            own, stored = table.parts[part], self.tensor(key)
            try:
                tensors[part] = filled(
                    to_ours(own.form, stored, module.shaped), own.rank, getattr(module.spec, "rank", None)
                )
            except ValueError as error:
                raise GraftError("GC113", f"{key}: {error}", place=self.place) from None
        return tensors

    def shared(self) -> dict[str, Tensor]:
        """Return the tensors that belong to the adaptation as a whole, by graftc's part names."""
        return {part: self.tensor(key) for part, key in self.keys.shared.items()}


def _ancestors(module: str) -> list[str]:
    segments = module.split(".")
    return [".".join(segments[:end]) for end in range(1, len(segments) + 1)]


def read_peft(
    path: str | Path,
    name: str | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    whole: bool = False,
) -> PeftAdapter:
    """Read an adapter that peft saved, without any model.

    Args:
        path: the folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: name of an adapter in a sub-folder, which peft creates for every adapter except ``default``.
        shapes: shapes of the base's tensors by name, in the base's order. Only needed if several parameters of one
            module are adapted (`target_parameters`), to distinguish them.
        whole: whether the caller applies fields of the config that concern more than the adaptation.

    Raises:
        GraftError: GC110 if there is no adapter, or only pickled weights; GC111 for a config that cannot be read; GC112
            for a type or an option without an equivalent; GC113 for tensors that do not match the config.
    """
    folder = _folder(as_path(path), name)
    config = read_config(config_bytes(folder / CONFIG), str(folder / CONFIG), whole=whole)
    file = adapter_tensors(folder / WEIGHTS)
    keys = parse(file.entries, config)
    if keys.unknown:
        message = f"the file has tensors that {config.peft_type} does not have: {some(keys.unknown, 5)}"
        raise GraftError("GC113", message, place=Place(str(folder / WEIGHTS)), details=keys.unknown[5:50])
    plain = {*keys.plain.values(), *(key for _, key in keys.again), *keys.unused}
    own = {key: stored.dtype for key, stored in file.entries.items() if key not in plain}
    parts = config.format[1].parts
    integers = {k for named in keys.modules.values() for part, k in named.items() if parts[part].form in INTEGERS}
    numbers = [
        f"{key} is {kind}"
        for key, kind in own.items()
        if kind not in FLOATING and not (key in integers and kind in ("I32", "I64"))
    ]
    if numbers:
        message = f"the method's tensors must be 16-, 32- or 64-bit floating-point: {numbers[0]}"
        raise GraftError("GC113", message, place=Place(str(folder / WEIGHTS)), details=numbers[1:50])
    doubles = tuple((keys.plain[name], key) for name, key in keys.again if name in keys.plain)
    bare = PeftAdapter(folder, config, keys, file, (), doubles)
    return replace(bare, modules=(*_modules(bare, shapes or {}), *_tables(bare)))


def _folder(path: Path, name: str | None) -> Path:
    folder = path if name is None or (name == "default" and (path / CONFIG).is_file()) else path / name
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return folder
    place = Place(str(folder))
    if not folder.is_dir():
        raise GraftError("GC110", f"{folder} {missing(folder, CONFIG)}", place=place, hint=reader_of(folder))
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    if not (folder / CONFIG).is_file():
        hint = f"name one of its adapters: {some(inside)}" if inside else reader_of(folder)
        raise GraftError("GC110", f"{folder} has no {CONFIG}", place=place, hint=hint)
    pickled = next((word for word in _PICKLES if (folder / word).exists()), None)
    if pickled is not None:
        raise GraftError("GC110", f"{folder} has only pickled weights ({pickled}), which are never read", place=place)
    raise GraftError("GC110", f"{folder} has no {WEIGHTS}", place=place)


def adapter_tensors(file: Path) -> TensorFolder:
    """Return the tensors in an adapter's file.

    Raises:
        GraftError: GC113 if it cannot be read.
    """
    return TensorFolder(file, Refusal("GC113", located=True))


def _modules(adapter: PeftAdapter, shapes: Mapping[str, Sequence[int]]) -> list[PeftModule]:
    _, table = adapter.config.format
    if table.joined is not None:
        return []
    by_rows = any(part.form == "rows" for part in table.parts.values())
    parameters = adapted_parameters(adapter.config, adapter.keys.modules, adapter.place, shapes)
    modules: list[PeftModule] = []
    unlike: list[str] = []
    for (path, depth), keys in adapter.keys.modules.items():
        parameter, named = parameters[path, depth]
        _check_axes(adapter, path, keys)
        around = adapter.keys.inside.get(path, "")
        spec, experts = method_at(adapter.config, around or (f"{path}.{parameter}" if named else path)), None
        if not named:
            unlike += _unlike_config(adapter, path, keys, spec)
        if around:
            spec = spec.model_copy(update={"alpha": ADDED * getattr(spec, "alpha", 1)})
        if named:
            experts = _experts(adapter, keys, int(getattr(spec, "rank", 1)), sure=bool(shapes))
        order = rows_of(adapter.config, path)[1] if by_rows else None
        inward = any(is_listed(adapter.config, name, path) for name in table.lists)
        shaped = Shaped(experts=experts, inward=inward, order=order)
        modules.append(PeftModule(path, parameter, spec, keys, shaped, depth, named, around=around))
    if unlike:
        message = f"the file does not match its config: {unlike[0]}"
        hint = f"restore {CONFIG} and {WEIGHTS} from the same checkpoint"
        raise GraftError("GC113", message, place=adapter.place, hint=hint, details=unlike[:50])
    return modules


def _check_axes(adapter: PeftAdapter, path: str, keys: Mapping[str, str]) -> None:
    spec_class, table = adapter.config.format
    for part, key in keys.items():
        axes, shape = table.parts[part].axes, adapter.shapes[key]
        if axes is not None and len(shape) not in axes:
            message = f"PEFT multiplies {key}, which is {list(shape)}, differently than {spec_class.tag()} does"
            hint = f"merge it in PEFT, or leave out {path}"
            raise GraftError("GC112", message, place=adapter.in_config("target_modules"), hint=hint)


def _unlike_config(adapter: PeftAdapter, path: str, keys: Mapping[str, str], spec: MethodSpec) -> Iterator[str]:
    """Yield how the factors of a low-rank update differ from what the config says: their rank, and their magnitudes."""
    parts, rank = adapter.config.format[1].parts, getattr(spec, "rank", None)
    for name, axis in (("A", 0), ("B", 1)):
        plain = name in keys and parts[name].form in ("down", "up") and parts[name].rank is None
        if plain and rank is not None and len(shape := adapter.shapes[keys[name]]) == 2 and shape[axis] != rank:
            yield f"{keys[name]} is {list(shape)}, but the config's rank is {rank}"
    for name, part in parts.items():
        if part.form == "vector" and name not in keys:
            yield f"{path}.{part.key}: required by the config, but not in the file"


def _experts(adapter: PeftAdapter, keys: Mapping[str, str], rank: int, *, sure: bool) -> int | None:
    """Return the number of matrices that the factors belong to; None for a single matrix.

    Without a base, the assignment of ranks to parameters is a guess.
    """
    rows = adapter.shapes[keys["A"]][0] if "A" in keys else rank
    if rows % rank and sure:
        message = f"{keys['A']} has {rows} rows, which is not a multiple of the rank {rank}"
        raise GraftError("GC113", message, place=adapter.place)
    return rows // rank if rows > rank else None


def _tables(adapter: PeftAdapter) -> list[PeftModule]:
    """Return the trained rows of embedding tables that are stored along with another method."""
    tables = []
    for path, key in adapter.keys.tokens.items():
        rows, order = rows_of(adapter.config, path)
        tables.append(PeftModule(path, "weight", table_rows(rows, path), {"weight": key}, Shaped(order=order)))
    return tables


def peft_digest(folder: Path) -> str:
    """Return the SHA-256 by which records of merges name an adapter: of the digests of its config and its tensors."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def finite(tensor: Tensor) -> bool:
    """Return whether every value is a finite number."""
    return bool(torch.isfinite(tensor).all())


def table_form(module: PeftModule, part: str) -> str:
    """Return the form in which a module's part is stored; empty if the method has no such part."""
    table = type(module.spec).peft
    own = table.parts.get(part) if table is not None else None
    return own.form if own is not None else ""
