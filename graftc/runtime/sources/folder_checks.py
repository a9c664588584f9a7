"""Check a model folder of unknown origin, before transformers reads any of it and afterwards.

The config determines how much time and memory transformers uses, and transformers casts the files' contents to the
dtypes of the model's tensors: both are checked against the files.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as registrations

from graftc.files.tensors.folder import Refusal, TensorFolder
from graftc.files.tensors.weights import UnsafeFileError, embedded_adapter, weight_files
from graftc.runtime.sources.refusals import refuse
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown
from graftc.specs.regular_files import JSON_BYTES, read_regular

WEIGHTS = ("*.safetensors", "*.bin")
_REFUSAL = Refusal("GC032", "GC101", "download the model again")
_VALUES = 2**19
"""The maximum number of values in a config."""
_COUNT = 100_000
"""The maximum number of layers or labels in a config, if nothing else limits it."""
_MODULES, _MODULES_PER_TENSOR = 2_000, 20
_MODULES_UNKNOWN = 200_000
_BYTES, _TIMES, _TIMES_PACKED = 2**27, 8, 64
"""Limits on the bytes of a model's tensors: a fixed part, and multiples of the files' size; a 1-bit weight may become a
32-bit one."""
_SUFFIXES = ("weight", "bias")
_EIGHT_BITS = "F8_"


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder.

    Attributes:
        path: the folder.
        stored: the tensors in its files; None if the files are pickles or the weights are not to be loaded.
        bytes: the size of its weights.
        quantised: whether its config declares the weights as quantised.
    """

    path: Path
    stored: TensorFolder | None
    bytes: int
    quantised: bool


def open_model_folder(folder: Path, where: str, *, weights: bool = True) -> ModelFolder:
    """Check a folder's config and the headers of its files.

    Args:
        folder: a folder with a ``config.json``.
        where: its name in errors.
        weights: whether its weights are to be loaded.

    Raises:
        GraftError: GC032 for an unusable config, damaged files, or more layers than the files have tensors for; GC101
            for names that lead outside the folder.
    """
    config = plain_config(folder, where)
    quantised = bool(config.get("quantization_config"))
    if not weights:
        return ModelFolder(folder, None, 0, quantised)
    if (adapter := embedded_adapter(folder)) is not None:
        message = f"{where!r} contains a model and {adapter}, which transformers would apply to it"
        refuse(message, f"move {adapter} and its tensors to a separate folder")
    try:
        safe = weight_files(folder) is not None
    except UnsafeFileError as error:
        raise _REFUSAL.error(folder, str(error), unsafe=True) from error
    except (OSError, ValueError):
        safe = True  # opening the files below raises the same error, with a code
    if not safe:
        return ModelFolder(folder, None, sum(file.stat().st_size for file in folder.glob("*.bin")), quantised)
    stored = TensorFolder(folder, _REFUSAL, strict=False)
    most = max(_counted(config, "layer"), default=0)
    if most > max(len(stored), _MODULES):
        message = f"the config of {where!r} has {most} layers, but its files have {len(stored)} tensors"
        refuse(message, "use a complete checkpoint")
    return ModelFolder(folder, stored, stored.size, quantised)


def plain_config(folder: Path, where: str, code: str = "GC032") -> dict[str, Any]:
    """Return a folder's config as plain data, after checks that limit the work of reading it.

    Args:
        folder: a folder with a ``config.json``.
        where: its name in errors.
        code: the error code.

    Raises:
        GraftError: with this code, for a file that is not a model's config, is too large, or has too many layers or
            labels.
    """
    hint = "download the model's config.json again"
    try:
        raw = read_regular(folder / "config.json", JSON_BYTES)
        if sum(map(raw.count, (b",", b"[", b"{"))) > _VALUES:
            raise ValueError(f"it has more than {_VALUES:,} values")
        data = json.loads(raw)
    except RecursionError as error:
        refuse(f"the config.json of {where!r} cannot be read: it is nested too deeply", hint, cause=error, code=code)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        refuse(f"the config.json of {where!r} cannot be read: {reason}", hint, cause=error, code=code)
    if not isinstance(data, dict):
        refuse(f"the config.json of {where!r} cannot be read: it is not a JSON object", hint, code=code)
    names = data.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        refuse(f"the config.json of {where!r} has architectures that are not names: {shown(names)}", hint, code=code)
    for word, what in (("layer", "layers"), ("num_labels", "labels")):
        if (most := max(_counted(data, word), default=0)) > _COUNT:
            refuse(f"the config.json of {where!r} asks for {most:,} {what}, more than {_COUNT:,}", hint, code=code)
    return data


def _counted(settings: Mapping[Any, Any], word: str) -> Iterator[int]:
    """Yield the values in a config that count things with a given name, such as ``layer``."""
    waiting: list[Any] = [settings]
    while waiting:
        mapping = waiting.pop()
        for name, value in mapping.items():
            if isinstance(value, dict):
                waiting.append(value)
            elif type(value) is int and (name == word or name.endswith((f"{word}s", f"_{word}"))):
                yield value


@contextmanager
def bounded_building(folder: ModelFolder, where: str) -> Iterator[None]:
    """Refuse any model that this thread builds in the block if the model is much larger than its files.

    Raises:
        GraftError: GC032 as soon as a model has too many modules or its tensors have too many bytes.
    """
    known = folder.stored
    modules = _MODULES_UNKNOWN if known is None else _MODULES + _MODULES_PER_TENSOR * len(known)
    most = None if not folder.bytes else _BYTES + (_TIMES_PACKED if folder.quantised else _TIMES) * folder.bytes
    thread, counts = threading.get_ident(), [0, 0]

    def count(*_: object) -> None:
        if threading.get_ident() == thread:
            counts[0] += 1
            if counts[0] > modules:
                has = "" if known is None else f", but its files have {len(known)} tensors"
                refuse(f"the config of {where!r} describes more than {modules:,} modules{has}", _LARGER)

    def measure(_: nn.Module, name: str, tensor: Tensor | None) -> None:
        if threading.get_ident() == thread and tensor is not None and most is not None:
            counts[1] += tensor.numel() * tensor.element_size()
            if counts[1] > most:
                refuse(
                    f"the config of {where!r} describes a model of more than {most:,} bytes, including a {name} of "
                    f"{list(tensor.shape)}, but its files have {folder.bytes:,}",
                    _LARGER,
                )

    hooks = [
        registrations.register_module_module_registration_hook(count),
        registrations.register_module_parameter_registration_hook(measure),
        registrations.register_module_buffer_registration_hook(measure),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


_LARGER = "download the config.json and the weights again, together"


def check_stored_types(
    model: nn.Module, stored: TensorFolder, code: str, where: str, read: Collection[str] = ()
) -> None:
    """Refuse stored weights that would be misread.

    These are integers where the model has floating-point values, and weights that are not multiplied by the scales
    stored beside them.

    Args:
        model: the model as loaded by transformers.
        stored: the tensors in the files.
        code: the error code.
        where: the folder's name.
        read: names of tensors that the caller interpreted itself.

    Raises:
        GraftError: with this code; it lists every such tensor.
    """
    integral = [n for n, t in stored.entries.items() if n not in read and not t.dtype.startswith(("F", "BF"))]
    beside = [name for name in stored if name not in read and _is_beside(name, stored, read)]
    wrong = []
    known = model.state_dict() if integral or beside else {}
    targets = target_names(model, [*integral, *beside], known)
    for name in integral:
        tensor = known.get(targets[name])
        if tensor is not None and tensor.is_floating_point():
            wrong.append(f"{name} is stored as {stored.entries[name].dtype}, which is not a dtype for weights")
    for name in beside:
        if targets[name] not in known:
            wrong.append(f"{name.rpartition('.')[0]}.weight would be loaded without {name}")
    if wrong:
        hint = "download the checkpoint again, with its own config.json"
        raise GraftError(code, f"{where}: {wrong[0]}", hint=hint, details=wrong[1:20])


def _is_beside(name: str, stored: TensorFolder, read: Collection[str]) -> bool:
    """Return whether a tensor describes a weight that would be loaded without it."""
    module, _, last = name.rpartition(".")
    weight = stored.entries.get(f"{module}.weight")
    if weight is None or weight.name in read or last in _SUFFIXES:
        return False
    return bool(read) or weight.dtype.startswith(_EIGHT_BITS)


def target_names(model: Any, names: Iterable[str], known: Mapping[str, Any]) -> dict[str, str]:
    """Return the model's tensors into which transformers loads stored ones, by stored name."""
    return {name: target for name, (target, _) in converted_names(model, names, known).items()}


def converted_names(model: Any, names: Iterable[str], known: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Return the names as in `target_names`, each with the pattern of the stored tensor's conversion, or None."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    wanted = list(names)
    if not wanted:
        return {}
    conversions = get_model_conversion_mapping(model, None, None)
    own = dict(known)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    targets: dict[str, tuple[str, str | None]] = {}
    for name in wanted:
        target, source = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        targets[name] = (name, None) if target not in known and name in known else (target, source)
    return targets
