"""The capture cache: canonicalised, weightless graphs in the user's cache directory, as JSON.

The key covers everything that a capture depends on: the contents of modules and the code that they reach (`holdings`),
the signature (inputs and flags), the versions of Python, torch, transformers and graftc with graftc's own code, and the
passes that plugins add. A model with contents that cannot be serialised has no key, and its captures are not stored;
the report names those contents.

Files are not trusted: a file is used only if it belongs to this user and no other user may write to it, its first line
is a digest of the rest, and it contains the requested key. Otherwise the model is captured again. The digest detects
damage but not tampering, which file permissions have to prevent. Set ``GRAFTC_CACHE`` to another directory, or to
``off``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from graftc.compiler.capture.capture import Capture, capture
from graftc.compiler.capture.identity.capture_key import LARGEST_TENSOR, UnknownHoldingError, holdings
from graftc.compiler.capture.identity.sources import own_digest
from graftc.compiler.capture.refusals import UntraceableError, by_values, told
from graftc.compiler.capture.request import CaptureRequest
from graftc.passes.core import progress
from graftc.passes.core.ir.shapes import DTYPE_NAMES, DTYPES, raw_bytes
from graftc.passes.core.ir.stored.serialise import SerialisationError, program_from_json, program_to_json
from graftc.passes.core.plugins import registered
from graftc.specs.errors.diagnostics import GraftError
from graftc.version import __version__

_LARGEST_FILE = 256 * 2**20
_STALE_SECONDS = 3600


def folder() -> Path | None:
    """Return the directory in which captures are stored; None if the cache is off."""
    setting = os.environ.get("GRAFTC_CACHE", "")
    if setting.lower() in ("off", "0"):
        return None
    if setting:
        return Path(setting)
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "graftc" / "captures"


def key(request: CaptureRequest) -> str | None:
    """Return the key of a capture; None for a model with contents that cannot be serialised."""
    try:
        return _key(request)
    except UnknownHoldingError:
        return None


def _key(request: CaptureRequest) -> str:
    import transformers

    versions = [platform.python_version(), torch.__version__, transformers.__version__, __version__]
    content = {
        "model": holdings(request.model),
        "axes": [(a.name, str(a.dtype), list(a.axes)) for a in request.axes],
        "flags": [list(flag) for flag in request.flags],
        "mode": request.mode,
        "versions": versions,
        "code": own_digest(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **({"passes": passes} if (passes := registered()) else {}),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def lookup(request: CaptureRequest) -> Capture | None:
    """Return the stored capture, with fake values on the model's device; None if there is none."""
    entry = _read(key(request), request.device)
    return entry if isinstance(entry, Capture) else None


def keep(request: CaptureRequest, capture: Capture) -> None:
    """Store a capture by writing a temporary file and renaming it; silently skip a capture that cannot be stored."""
    _write(key(request), capture)


def forget(request: CaptureRequest) -> None:
    """Remove a stored capture that turned out to be wrong."""
    path = _path(key(request))
    if path is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)


Known = Mapping[str, Callable[[], Capture | None]]
"""Functions that return existing captures, by key; they return None if the file has since been removed."""


def captured(request: CaptureRequest, known: Known = MappingProxyType({}), *, use_cache: bool = True) -> Capture:
    """Return the known capture for the request's key, one from the cache, or a new one, which is stored in the cache.

    A known capture whose file has since been removed is not used. See `graftc.compiler.capture.capture.capture`.
    """
    progress.step(f"capture({request.mode})")
    try:
        wanted, aside = _key(request), ""
    except UnknownHoldingError as unknown:
        wanted, aside = None, str(unknown)
    known_capture = known[wanted]() if wanted is not None and wanted in known else None
    if known_capture is not None:
        return replace(known_capture, key=wanted)
    entry = _read(wanted, request.device) if use_cache else None
    if isinstance(entry, GraftError):
        raise entry
    if entry is not None:
        return entry
    try:
        new = replace(capture(request), key=wanted)
    except GraftError as refusal:
        if use_cache and by_values(refusal.__cause__):
            _write_content(wanted, {"refused": [refusal.message, refusal.hint, told(refusal.__cause__ or refusal)]})
        raise
    if use_cache:
        _write(wanted, new)
        if aside and folder() is not None:
            new.notes += (f"not kept in the capture cache, whose keys cannot include this: {aside}",)
    return new


def _read(wanted: str | None, device: torch.device) -> Capture | GraftError | None:
    """Return a stored capture, or the error of a model that no graph can represent; None if there is neither."""
    path = _path(wanted)
    if path is None:
        return None
    started = time.perf_counter()
    try:
        text = _content(path)
    except OSError:
        return None
    try:
        digest, _, content = text.partition(b"\n")
        if digest.decode() != hashlib.sha256(content).hexdigest():
            raise ValueError("damaged")
        data = json.loads(content)
        if data["key"] != wanted:
            raise ValueError("the capture of something else")
        if "refused" in data:
            message, hint, reason = map(str, data["refused"])
            error = GraftError("GC030", message, hint=hint)
            error.__cause__ = UntraceableError(ValueError(reason))
            return error
        program = program_from_json(data["program"], device, called=True)
        constants = {name: _tensor(value, device) for name, value in data["constants"].items()}
        notes = tuple(str(note) for note in data["notes"])
        read = tuple((str(path), str(name)) for path, name in data["read"])
    except Exception:  # whatever is wrong with the file, the model can be captured again
        with suppress(OSError):
            path.unlink()
        return None
    return Capture(program, constants, time.perf_counter() - started, cached=True, notes=notes, key=wanted, read=read)


def _content(path: Path) -> bytes:
    """Return the contents of a trusted file.

    Raises:
        OSError: if there is no file, or if it is not a regular file of this user that no other user may write to.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        usual = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size <= _LARGEST_FILE
        others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if not usual or (hasattr(os, "geteuid") and (status.st_uid != os.geteuid() or others_write)):
            raise PermissionError(f"{path} is not trusted")
        return file.read(min(status.st_size, _LARGEST_FILE) + 1)  # limits the memory that reading takes


def _write(wanted: str | None, capture: Capture) -> None:
    """Store a capture by writing a temporary file and renaming it, unless it cannot be serialised or written."""
    if _path(wanted) is None or any(t.numel() * t.element_size() > LARGEST_TENSOR for t in capture.constants.values()):
        return
    try:
        data = {
            "program": program_to_json(capture.traced),
            "constants": {name: _encode(tensor) for name, tensor in capture.constants.items()},
            "notes": list(capture.notes),
            "read": [list(place) for place in capture.read],
        }
        _write_content(wanted, data)
    except (SerialisationError, ValueError):
        return


def _write_content(wanted: str | None, data: Mapping[str, Any]) -> None:
    if (path := _path(wanted)) is None:
        return
    content = json.dumps({"key": wanted, **data}, separators=(",", ":")).encode()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with open(handle, "wb") as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def _sweep(where: Path) -> None:
    """Remove the temporary files of writers that were killed."""
    for path in where.glob("*.tmp"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _STALE_SECONDS:
                path.unlink()


def _path(wanted: str | None) -> Path | None:
    base = folder()
    return base / f"{wanted}.json" if base is not None and wanted is not None else None


def _encode(tensor: torch.Tensor) -> dict[str, Any]:
    if tensor.device.type == "meta":
        raise SerialisationError("a constant on the meta device")
    data = base64.b64encode(raw_bytes(tensor)).decode()
    return {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data": data}


def _tensor(data: dict[str, Any], device: torch.device) -> torch.Tensor:
    raw = bytearray(base64.b64decode(data["data"]))
    dtype = DTYPES[data["dtype"]]
    if not raw:
        return torch.empty(data["shape"], dtype=dtype, device=device)
    return torch.frombuffer(raw, dtype=dtype).reshape(data["shape"]).to(device)
