"""Changed artifacts: structural mutations of their files, sealed again so that readers see the changed contents."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from graftc.runtime.artifact.manifest import sealed
from tests.runtime.artifact.support import mend

GRAPHS = tuple(f"programs/0.{kind}.json" for kind in ("base.train", "base.eval", "train", "eval"))
CERTIFICATE, TENSORS, SPEC = "certificates/fold.json", "adapters.safetensors", "spec.yaml"

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 2**31, 2**62, 2**63, -(2**63), 2**64, 1e308, -0.5),
    *(
        "",
        "x",
        "s0",
        "s0*9999999",
        "((9)**8)**8",
        "self",
        "\u017felf",
        "lambda",
        "../x",
        "/etc/passwd",
        "/dev/zero",
        "payload:make",
    ),
    *("x; import os", "\x1b[31m", "\u202e", "a" * 10_000, "aten.from_file.default", "aten.fill_.Scalar", "os.system"),
    *(
        [],
        [1],
        [[]],
        [None],
        {},
        {"node": 0},
        {"node": 10**6},
        {"tuple": []},
        {"size": "s0"},
        {"float": "nan"},
        {"x": 1},
    ),
    *({"dtype": "f32"}, {"dtype": "f32", "shape": ["2**40", "2**20"]}, [["batch", 2**40]], [2**40] * 8),
)
OPERATORS = (
    *("aten.fill_.Scalar", "aten.zero_.default", "aten.copy_.default", "aten.add_.Tensor", "aten.from_file.default"),
    *(
        "aten.set_.source_Tensor",
        "aten.resize_.default",
        "aten.as_strided.default",
        "aten.mul.Tensor",
        "aten.matmul.default",
    ),
    *("aten.unbind.int", "aten.split.Tensor", "aten.zeros.default", "aten.repeat.default", "aten.item.default"),
    *("aten.full.default", "aten.arange.default", "aten.expand.default", "operator.mul", "operator.getitem"),
)
KINDS = ("insert", "insert", "operator", "literal", "exchange", "drop", "type", "size", "argument", "any")
LINES = ("x: 1", "  rank: 99", "&a *a", "\x00", "- {", "é: !!python/name:os")
SIZES = (
    "s0",
    "2**62",
    "s0*s0*s0",
    "((s0)**8)**8",
    "FloorDiv(s0, 0)",
    "Mod(s0, 0)",
    "-s0",
    "0",
    "1000000000",
    "Max(s0, s9)",
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in JSON data."""
    paths = [path]
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        paths += places(value, (*path, key))
    return paths


def at(data: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at the end of a path."""
    for key in path:
        data = data[key]
    return data


def change(data: Any, rng: random.Random) -> Any:
    """Return JSON data with one value replaced, deleted, doubled, wrapped or exchanged with another."""
    ways = places(data)
    path = rng.choice(ways[1:] or ways)
    if not path:
        return rng.choice(HOSTILE)
    owner, key = at(data, path[:-1]), path[-1]
    kind = rng.choice(("replace", "replace", "replace", "delete", "double", "wrap", "swap", "key"))
    if kind == "replace":
        owner[key] = rng.choice(HOSTILE)
    elif kind == "delete":
        del owner[key]
    elif kind == "double" and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind == "wrap":
        value = owner[key]
        for _ in range(rng.choice((1, 3, 200))):
            value = [value]
        owner[key] = value
    elif kind == "key" and isinstance(owner, dict):
        owner[str(rng.choice(HOSTILE))] = owner.pop(key)
    else:
        other = rng.choice(ways[1:])
        owner[key] = json.loads(json.dumps(at(data, other))) if other[: len(path)] != path else rng.choice(HOSTILE)
    return data


def change_graph(data: dict[str, Any], rng: random.Random) -> Any:
    """Return a graph with one node inserted, replaced or moved, or with other literals, types or names."""
    nodes = data["nodes"]
    calls = [i for i, node in enumerate(nodes) if node["op"] == "call_function"]
    chosen = rng.choice(calls)
    node = nodes[chosen]
    kind = rng.choice(
        ("insert", "insert", "operator", "literal", "exchange", "drop", "type", "size", "argument", "any")
    )
    if kind == "insert":
        source = {"node": rng.randrange(len(nodes) - 1)}
        args = rng.choice(
            ([source], [source, rng.choice(HOSTILE)], [source, source], [source, 0, 1], [[source], 2**40])
        )
        inserted = {
            **node,
            "name": f"evil_{rng.randrange(99)}",
            "target": rng.choice(OPERATORS),
            "args": {"tuple": args},
        }
        nodes.insert(len(nodes) - 1, {**inserted, "kwargs": {}})
    elif kind == "operator":
        node["target"] = rng.choice((*OPERATORS, nodes[rng.choice(calls)]["target"]))
    elif kind == "literal":
        args = node["args"]["tuple"]
        args.insert(rng.randrange(len(args) + 1), rng.choice(HOSTILE))
    elif kind == "argument":
        node["args"]["tuple"][0] = {"node": rng.randrange(-2, len(nodes) + 2)}
    elif kind == "exchange":
        other = rng.choice(calls)
        nodes[chosen], nodes[other] = nodes[other], nodes[chosen]
    elif kind == "drop":
        del nodes[chosen]
    elif kind == "type":
        node["type"] = rng.randrange(len(data["types"]))
    elif kind == "size":
        shaped = [t for t in data["types"] if isinstance(t, dict) and t.get("shape")]
        shape = rng.choice(shaped)["shape"]
        shape[rng.randrange(len(shape))] = rng.choice(SIZES)
    else:
        return change(data, rng)
    return data


def flip(raw: bytes, rng: random.Random) -> bytes:
    """Return the bytes with some changed, some removed or some added."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(rng.choice((data, data, data, data[: rng.randrange(len(data) + 1)], data + data[:99])))


def mutate(artifact: Path, number: int) -> str:
    """Change an artifact in a way determined by a number, seal it again, and return what was changed."""
    rng = random.Random(number)
    kind = rng.choice(("manifest", "manifest", "graph", "graph", "graph", "certificate", "tensors", "spec", "bytes"))
    if kind == "manifest":
        return _manifest(artifact, rng)
    if kind == "bytes":
        file = artifact / rng.choice((*GRAPHS, CERTIFICATE, TENSORS, SPEC))
        file.write_bytes(flip(file.read_bytes(), rng))
    elif kind in ("graph", "certificate"):
        file = artifact / (rng.choice(GRAPHS) if kind == "graph" else CERTIFICATE)
        data = json.loads(file.read_text(encoding="utf-8"))
        data = (change_graph if kind == "graph" else change)(data, rng)
        file.write_text(json.dumps(data, ensure_ascii=rng.random() < 0.5), encoding="utf-8")
    elif kind == "tensors":
        file = artifact / TENSORS
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.dumps(change(json.loads(raw[8 : 8 + size]), rng)).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    else:
        file = artifact / SPEC
        lines = file.read_text(encoding="utf-8").splitlines()
        lines.insert(
            rng.randrange(len(lines) + 1),
            rng.choice(LINES),
        )
        file.write_text("\n".join(lines), encoding="utf-8")
    mend(artifact)
    return f"{number}: {kind} of {file.name}"


def _manifest(artifact: Path, rng: random.Random) -> str:
    data = json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))
    data.pop("digest")

    def wanted(value: Any) -> Any:
        changed = change({"value": value}, rng)
        return changed.get("value") if isinstance(changed, dict) else changed

    field = rng.choice(list(data))
    before, data[field] = data[field], wanted(data[field])
    try:
        text = sealed(data).encode()
    except (ValueError, RecursionError):  # canonical JSON cannot represent it
        text = sealed({**data, field: [before]}).encode()
    (artifact / "manifest.json").write_bytes(text)
    return f"manifest: {field}"
