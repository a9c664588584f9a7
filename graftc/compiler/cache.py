"""The capture cache: canonicalised, weightless graphs in the user's cache folder, as JSON.

The key covers everything that a capture depends on: the model's class and its source, its config, the names, types
and ties of its tensors, the signature (inputs and flags), and the versions of Python, torch, transformers and graftc.
A model without a config is not cached: what its attributes do to its forward cannot be told. Set ``GRAFTC_CACHE`` to
another folder, or to ``off``.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import graftc
from graftc.compiler.capture import Capture, capture
from graftc.compiler.interface import Flags, device_of
from graftc.compiler.signature import Axis
from graftc.passes.core.program import Mode
from graftc.passes.core.serialise import SerialisationError, program_from_json, program_to_json
from graftc.passes.core.shapes import DTYPE_NAMES, DTYPES

_LARGEST_CONSTANT = 65536


def folder() -> Path | None:
    """Where captures are kept; None when the cache is off."""
    setting = os.environ.get("GRAFTC_CACHE", "")
    if setting.lower() in ("off", "0"):
        return None
    if setting:
        return Path(setting)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "graftc" / "captures"


def key(model: nn.Module, axes: Sequence[Axis], flags: Flags = (), mode: Mode = "train") -> str | None:
    """The key of a capture; None for a model that cannot be told from its config."""
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None or not type(model).__module__.startswith("transformers."):
        return None
    import transformers

    owners: dict[int, str] = {}
    tensors = []
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            owner = owners.setdefault(id(tensor), name)
            tensors.append((kind, name, owner, str(tensor.dtype), list(tensor.shape)))
    settings = {k: v for k, v in to_dict().items() if not k.startswith("_name_or_path")}
    settings["_attn_implementation"] = getattr(config, "_attn_implementation", None)
    # Modules may differ from what the config alone would build (a dropout switched off by hand), so their printed
    # form belongs to the key as well.
    content = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "source": _source_digest(model),
        "config": json.loads(json.dumps(settings, sort_keys=True, default=str)),
        "modules": repr(model),
        "tensors": tensors,
        "axes": [(a.name, str(a.dtype), list(a.axes)) for a in axes],
        "flags": [list(flag) for flag in flags],
        "mode": mode,
        "versions": [
            platform.python_version(),
            torch.__version__,
            transformers.__version__,
            graftc.__version__,
        ],
        "code": _own_digest(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for path in sorted({f for m in model.modules() if (f := _file(type(m)))}):
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _file(cls: type[Any]) -> str | None:
    if cls.__module__.startswith("torch."):
        return None
    try:
        return inspect.getsourcefile(cls)
    except TypeError:
        return None


def _own_digest() -> str:
    """A digest of the code that makes captures: a change of it makes old entries unreachable."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in (here / "capture.py", here / "signature.py", here.parent / "passes" / "canonicalise.py"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def lookup(model: nn.Module, axes: Sequence[Axis], flags: Flags = (), mode: Mode = "train") -> Capture | None:
    """The kept capture, with fake values on the model's device, or None."""
    return _read(key(model, axes, flags, mode), device_of(model))


def keep(model: nn.Module, axes: Sequence[Axis], found: Capture) -> None:
    """Keep a capture; written beside and renamed. What cannot be kept is passed over silently."""
    _write(key(model, axes, found.program.flags, found.program.mode), found)


def captured(
    model: nn.Module,
    axes: Sequence[Axis],
    flags: Flags = (),
    *,
    mode: Mode = "train",
    canonical: Mapping[str, str],
    use_cache: bool = True,
    known: Mapping[str, Callable[[], Capture]] = MappingProxyType({}),
) -> Capture:
    """A capture that is known under its key, one from the cache, or a new one that goes there.

    See `graftc.compiler.capture.capture`.
    """
    wanted = key(model, axes, flags, mode)
    if wanted is not None and wanted in known:
        return replace(known[wanted](), key=wanted)
    entry = _read(wanted, device_of(model)) if use_cache else None
    if entry is not None:
        return entry
    found = replace(capture(model, axes, flags=flags, mode=mode, canonical=canonical), key=wanted)
    if use_cache:
        _write(wanted, found)
    return found


def _read(wanted: str | None, device: torch.device) -> Capture | None:
    path = _path(wanted)
    if path is None:
        return None
    started = time.perf_counter()
    try:
        data = json.loads(path.read_text())
        program = program_from_json(data["program"], device)
        constants = {name: _tensor(value, device) for name, value in data["constants"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    seconds = time.perf_counter() - started
    return Capture(program, constants, seconds, cached=True, notes=tuple(data.get("notes", ())), key=wanted)


def _write(wanted: str | None, found: Capture) -> None:
    path = _path(wanted)
    if path is None or any(t.numel() * t.element_size() > _LARGEST_CONSTANT for t in found.constants.values()):
        return
    try:
        constants = {name: _encode(tensor) for name, tensor in found.constants.items()}
        data = {
            "program": program_to_json(found.program),
            "constants": constants,
            "notes": list(found.notes),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(data, file, separators=(",", ":"))
        os.replace(file.name, path)
    except (SerialisationError, OSError):
        return


def _path(wanted: str | None) -> Path | None:
    base = folder()
    return base / f"{wanted}.json" if base is not None and wanted is not None else None


def _encode(tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.device.type == "meta":
        raise SerialisationError("a constant on the meta device")
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    shape = list(tensor.shape)
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data": base64.b64encode(raw).decode()}


def _tensor(data: dict[str, Any], device: torch.device) -> torch.Tensor:
    raw = bytearray(base64.b64decode(data["data"]))
    dtype = DTYPES[data["dtype"]]
    if not raw:
        return torch.empty(data["shape"], dtype=dtype, device=device)
    return torch.frombuffer(raw, dtype=dtype).reshape(data["shape"]).to(device)
