"""Structural mutations of untrusted files: JSON, headers of tensor files, rows of data."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.gates.mutate import places

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 10**4, 10**7, 2**31, 2**53, 2**62, 2**63, 2**64, 10**400, 0.5, -0.5, 1e308),
    *("", "x", "auto", "gelu", "float16", "int8", "eager", "../x", "/etc/passwd", "/dev/zero", "LORA", "LlamaModel"),
    *("a" * 10_000, "a." * 5_000, "a" * 1_000_000, "(a|b)?" * 50_000, "((a+)+)+b", "\x00", "\u202e", "None", "7"),
    *([], [None], [5], [[]], ["x"], ["../x"], [1] * 1000, [2**62] * 8, [0, -1], {}, {"x": 1}, {"a": {"b": []}}),
    *(["model.norm"], ["q_proj"], {"q_proj": 2}, {"0": "x"}, [2**40] * 2, list(range(5_000))),
    {str(n): n for n in range(5_000)},
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U32", "BOOL", "C64", "F8_E4M3", "F4", "?")
NAMES = (
    *("", ".", "__metadata__", "model.norm.weight", "lm_head.weight", "\x00", "../x", "\u00e4"),
    *("a." * 60, "a." * 60_000, "x" * 5_000),
)


def any_value(rng: random.Random) -> Any:
    """Return a copy of one of the values."""
    return copy.deepcopy(rng.choice(VALUES))


def set_at(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return JSON data with the value at one path replaced."""
    if not path:
        return value
    owner = data
    for step in path[:-1]:
        owner = owner[step]
    owner[path[-1]] = value
    return data


def get_at(data: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path."""
    for step in path:
        data = data[step]
    return data


def mutated(data: Any, rng: random.Random) -> Any:
    """Return JSON data with one to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        ways = [path for path in places(data) if path]
        if not ways:
            return any_value(rng)
        path, kind = rng.choice(ways), rng.randrange(8)
        owner, value = get_at(data, path[:-1]), get_at(data, path)
        if kind <= 2:
            data = set_at(data, path, any_value(rng))
        elif kind == 3:
            del owner[path[-1]]
        elif kind == 4 and isinstance(owner, dict):
            owner[rng.choice((*NAMES, "x", *owner))] = owner.pop(path[-1])
        elif kind == 5:
            data = set_at(data, path, copy.deepcopy(get_at(data, rng.choice(ways))))
        elif kind == 6 and type(value) is int:
            data = set_at(
                data, path, rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, str(value)))
            )
        elif isinstance(owner, dict):
            owner[rng.choice((*NAMES, "bias", "num_layers", "revision"))] = any_value(rng)
        elif isinstance(owner, list):
            owner.insert(rng.randrange(len(owner) + 1), any_value(rng))
        if isinstance(owner, dict) and rng.random() < 0.02:
            owner["deep"] = nested(rng.choice((50, 900, 20_000)))
    return data


def mutated_quantisation(config: Any, rng: random.Random) -> Any:
    """Return a config whose quantisation section is changed."""
    config["quantization_config"] = mutated(config["quantization_config"], rng)
    return config


class Raw:
    """Text that is inserted into JSON verbatim."""

    def __init__(self, text: str) -> None:
        self.text = text


def nested(depth: int) -> Raw:
    """Return lists nested to a depth."""
    return Raw("[" * depth + "]" * depth)


def dumped(data: Any) -> bytes:
    """Return the data as JSON, including `Raw` texts and values that JSON does not have."""
    texts: list[str] = []

    def plain(value: Any) -> str:
        if isinstance(value, Raw):
            texts.append(value.text)
            return f"\ue000{len(texts) - 1}\ue000"
        raise TypeError(type(value).__name__)

    text = json.dumps(data, default=plain, ensure_ascii=False)
    for number, raw in enumerate(texts):
        text = text.replace(f'"\ue000{number}\ue000"', raw)
    return text.encode("utf-8", "surrogatepass")


def mutated_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Return the bytes with some changed, removed or inserted."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + rng.choice((1, 8, 100))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 4:
            data[at : at + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"{}{}{}{}", b'"x":1,"x"'))
        else:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + 50]
    return bytes(data)


def json_file(path: Path, rng: random.Random, change: Callable[[Any, random.Random], Any] = mutated) -> None:
    """Change a JSON file."""
    raw, kind = path.read_bytes(), rng.randrange(10)
    if kind == 0:
        raw = mutated_bytes(raw, rng)
    elif kind == 1:  # a duplicate key
        data = json.loads(raw)
        key = rng.choice(list(data)) if isinstance(data, dict) and data else "x"
        raw = b"{" + dumped(key) + b":" + dumped(any_value(rng)) + b"," + raw.strip()[1:]
    else:
        raw = dumped(change(json.loads(raw), rng))
    path.write_bytes(raw)


def tensor_file(path: Path, rng: random.Random) -> None:
    """Change a file of tensors: its header by structure, or its bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + size], raw[8 + size :]
    kind = rng.randrange(12)
    if kind == 0:
        path.write_bytes(mutated_bytes(raw, rng))
        return
    if kind == 1:  # only the values
        path.write_bytes(raw[: 8 + size] + _values(data, rng))
        return
    if kind == 2:
        header = mutated_bytes(header, rng)
    elif kind == 3:
        header = dumped(mutated(json.loads(header), rng))
    else:
        header = dumped(_header(json.loads(header), rng))
    length = len(header) if rng.random() < 0.98 else rng.choice((0, 1, size + 1, 2**31, 2**63, 2**64 - 1))
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + b"more"
    path.write_bytes(length.to_bytes(8, "little") + header + data)


def _values(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return data
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(min(4, len(data) - at)) + data[at + 4 :]


def _header(data: dict[str, Any], rng: random.Random) -> Any:
    """Return a header with one tensor described differently."""
    names = [name for name in data if name != "__metadata__"]
    if not names:
        return data
    name, other = rng.choice(names), rng.choice(names)
    entry, kind = data[name], rng.randrange(10)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = entry["shape"][::-1]
    elif kind == 2:
        total = 1
        for each in entry["shape"]:
            total *= each
        entry["shape"] = rng.choice(
            ([total], [1, total], [total, 1], [total, 1, 1], [2, total // 2], [*entry["shape"], 1])
        )
    elif kind == 3:
        at = rng.randrange(2)
        entry["data_offsets"][at] += rng.choice((-1, 1, -4, 4, 2**31, -(2**31)))
    elif kind == 4:
        entry["data_offsets"], data[other]["data_offsets"] = data[other]["data_offsets"], entry["data_offsets"]
    elif kind == 5:
        data[rng.choice((*NAMES, f"{name}_scale", f"{name}_scale_inv", f"x.{name}", name.upper()))] = data.pop(name)
    elif kind == 6:
        del data[name]
    elif kind == 7:
        data[name], data[other] = data[other], data[name]
    elif kind == 8:
        same = {"F32": "I32", "BF16": "F16", "F16": "BF16", "I32": "F32", "U8": "I8", "I8": "U8", "F8_E4M3": "U8"}
        entry["dtype"] = same.get(entry["dtype"], "F32")
    else:
        data["__metadata__"] = rng.choice(({}, {"format": "pt"}, {"format": "tf"}, {"a": 1}, [], "x", None))
    return data


def data_file(path: Path, rng: random.Random) -> None:
    """Change a file of rows."""
    raw, kind = path.read_bytes(), rng.randrange(6)
    lines = raw.split(b"\n")
    if kind == 0:
        raw = mutated_bytes(raw, rng)
    elif kind == 1:
        at = rng.randrange(len(lines))
        lines[at : at + 1] = rng.choice(([], [b""], [lines[at]] * 3, [b" "], [b'"'], [b"\xef\xbb\xbf" + lines[at]]))
        raw = b"\n".join(lines)
    elif kind == 2:
        mark = rng.choice((b",", b"\t", b'"', b"\r", b"\r\n", b"\0", b"{", b":", b'""', b"\xff", "é".encode()))
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + mark * rng.choice((1, 1, 2, 1_000, 100_000)) + raw[at:]
    elif kind == 3 and path.suffix == ".jsonl":
        at = rng.randrange(len(lines) - 1)
        lines[at] = dumped(mutated(json.loads(lines[at]), rng))
        raw = b"\n".join(lines)
    elif kind == 4:
        raw = raw.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"")))
    else:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + b"x" * rng.choice((1, 99_000, 200_000)) + raw[at:]
    path.write_bytes(raw)


def parses(folder: Path) -> bool:
    """Return whether all JSON, headers of tensor files and rows of data in a folder can be parsed."""
    try:
        for path in folder.rglob("*"):
            if path.is_symlink() or not path.is_file():
                continue
            if path.suffix == ".safetensors":
                raw = path.read_bytes()
                json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix in (".csv", ".tsv", ".jsonl"):
                lines = path.read_text(encoding="utf-8").split("\n")
                if path.suffix == ".jsonl":
                    all(json.loads(line) for line in lines if line.strip())
    except (ValueError, RecursionError):
        return False
    return True
