"""Identify a folder or file that was passed to the wrong function, and find the call that reads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftc.files.tensors.file_names import MANIFEST, MANIFEST_BYTES, STATE_RECORD
from graftc.files.tensors.headers import read_shard
from graftc.runtime.sources.quantised import PACKED_FORMATS
from graftc.specs.foreign.config import CONFIG as ADAPTER_CONFIG
from graftc.specs.regular_files import JSON_BYTES, read_regular
from graftc.specs.strict_json import read_json

_MODEL_CONFIG, _MODEL_FILE, _GGUF = "config.json", "model.safetensors", ".gguf"


def missing(path: Path, file: str) -> str:
    """Return why a folder that needs a file cannot be read, as text that follows the folder's name in a message."""
    if os.path.isdir(path):
        return f"has no {file}"
    return "is a file, not a directory" if os.path.exists(path) else "does not exist"


def reader_of(path: Path, unless: str = "") -> str | None:
    """Return a hint that describes what a path contains and names the call that reads it; None if it is unknown.

    Only file names, and small files that describe the others, are read.

    Args:
        path: a folder or a file.
        unless: the function that was called, such as ``graftc.load``, so that it is not suggested again.
    """
    what, call = _told(path)
    return None if not call or (unless and call.startswith(f"{unless}(")) else f"it is {what}: {call} reads it"


def is_adapter(path: Path) -> bool:
    """Return whether a folder contains an artifact or a PEFT adapter."""
    return os.path.isfile(path / ADAPTER_CONFIG) or _is_artifact(path)


def _told(path: Path) -> tuple[str, str]:
    """Return a description of what a path contains, and the call that reads it; empty strings if it is unknown."""
    name = repr(str(path))
    if os.path.isfile(path):
        return _told_of_file(path, name)
    if _is_artifact(path):
        return "a graftc artifact", f"graftc.load({name})"
    if os.path.isfile(path / ADAPTER_CONFIG):
        return "a PEFT adapter", f"graftc.import_peft({name}, model)"
    if is_state_dict(path / _MODEL_FILE):
        return "a trainer's checkpoint of a compiled model", f"graftc.load({name})"
    if os.path.isfile(path / _MODEL_CONFIG):
        return _told_of_model(path, name)
    if ggufs := _names(path, f"*{_GGUF}"):
        return "a folder of GGUF files", _gguf_call(name, ggufs[0])
    if inner := _names(path, f"*/{ADAPTER_CONFIG}"):
        return "a folder of PEFT adapters", f"graftc.import_peft({name}, model, name={Path(inner[0]).parent.name!r})"
    if inner := [file for file in _names(path, f"*/{MANIFEST}") if _is_artifact((path / file).parent)]:
        return "a folder of artifacts", f"graftc.load({str((path / inner[0]).parent)!r})"
    return "", ""


def _told_of_file(path: Path, name: str) -> tuple[str, str]:
    folder = repr(str(path.parent))
    if path.suffix == _GGUF:
        return "a GGUF file", _gguf_call(folder, path.name)
    if path.name in (MANIFEST, ADAPTER_CONFIG, "adapter_model.safetensors", _MODEL_CONFIG, _MODEL_FILE):
        what, call = _told(path.parent)
        return (f"a file of {what}", call) if call else ("", "")
    if path.suffix in (".yaml", ".yml", ".toml", ".json"):
        return "possibly a spec", f"graftc.compile({name}, model)"
    return "", ""


def _told_of_model(path: Path, name: str) -> tuple[str, str]:
    quantisation = _json(path / _MODEL_CONFIG, JSON_BYTES).get("quantization_config")
    if isinstance(quantisation, Mapping):
        kind = str(quantisation.get("quant_method", "quantised"))[:40]
        if kind not in PACKED_FORMATS:
            return f"a transformers model quantised by {kind}", f"AutoModel.from_pretrained({name})"
        return f"a transformers model quantised by {kind}", f"graftc.load_base({name})"
    return "a transformers model without graftc.json, which merged.save writes", f"graftc.load_base({name})"


def _gguf_call(folder: str, file: str) -> str:
    return f"transformers.AutoModelForCausalLM.from_pretrained({folder}, gguf_file={file!r})"


def _is_artifact(path: Path) -> bool:
    return _json(path / MANIFEST, MANIFEST_BYTES).get("artifact") == "graftc"


def is_state_dict(file: Path) -> bool:
    """Return whether a file contains the state dict of a compiled model."""
    try:
        return os.path.isfile(file) and STATE_RECORD in read_shard(file).tensors
    except (OSError, ValueError):
        return False


def _json(file: Path, most: int) -> Mapping[str, Any]:
    """Return the mapping in a small JSON file; empty if the file does not contain one."""
    try:
        data = read_json(read_regular(file, most), most)
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _names(folder: Path, pattern: str) -> list[str]:
    try:
        return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))
    except (OSError, ValueError):  # a null character in the path, since Python 3.13
        return []
