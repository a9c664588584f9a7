"""``python -m tools.operators``: check the literal list of operators that a file may name.

The list is kept in `graftc/passes/core/ir/stored/allowed_operators.py` and reviewed there. This tool checks it against
its rules (`objection`), and against the operators that captures emit: the records of ``make coverage`` list those of
every architecture. Missing operators without an objection are added with ``--write``; others are never added.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import torch

from graftc.passes.core.ir.stored.allowed_operators import OPERATORS
from graftc.passes.core.ir.stored.serialise import HOMES

ROOT = Path(__file__).resolve().parents[1]
MODULE = ROOT / "graftc" / "passes" / "core" / "ir" / "stored" / "allowed_operators.py"
RECORDS = ROOT / "build" / "coverage"

TYPES = frozenset({"Tensor", "int", "float", "number", "bool", "str", "Device", "SymInt", "Generator"})
"""The types that arguments may be made of. No file can contain a generator, so such an argument is always None."""

UNSAFE = (
    "from_file",
    "set_",
    "resize",
    "as_strided",
    "storage",
    "record_stream",
    "manual_seed",
    "pin_memory",
    "_version",
)
"""Parts of the names of operators that access files, storages, sizes, explicit strides or the state of torch."""


def operator(name: str) -> torch._ops.OpOverload | None:
    """Return the overload of a name ``namespace.operator.overload``, or None."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    if namespace in HOMES:
        importlib.import_module(HOMES[namespace])
    candidate = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    return candidate if isinstance(candidate, torch._ops.OpOverload) else None


def objection(name: str) -> str | None:
    """Return the reason why no file may name an operator; None if there is none."""
    overload = operator(name)
    if overload is None:
        return "there is none"
    schema = overload._schema
    packet = name.split(".")[1]
    if any(word in packet for word in UNSAFE):
        return "it reads or writes files, or changes what memory a tensor is"
    if any(a.is_out for a in schema.arguments):
        return "it writes to an argument that is not an input"
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if written and (not packet.endswith("_") or written != [schema.arguments[0].name]):
        return f"it writes to {', '.join(written)}"
    for argument in schema.arguments:
        words = set("".join(c if c.isalnum() else " " for c in str(argument.type)).split())
        other = words - TYPES - {"Optional", "List"}
        if other:
            return f"{argument.name} is {', '.join(sorted(other))}"
    return None


def emitted(records: Path) -> set[str]:
    """Return the operators of all architectures that ``make coverage`` has examined."""
    names: set[str] = set()
    for file in records.glob("*.json"):
        names.update(json.loads(file.read_text())["record"].get("_operators", ()))
    return {name for name in names if name.split(".")[0] in ("aten", *HOMES)}


def write(names: Iterable[str]) -> None:
    """Write the names into the module, sorted."""
    head, _, _ = MODULE.read_text().partition('_NAMES = """')
    body = textwrap.fill(" ".join(sorted(names)), 116, initial_indent="", break_on_hyphens=False)
    MODULE.write_text(f'{head}_NAMES = """\n{body}\n"""\n\nOPERATORS = frozenset(_NAMES.split())\n"""All of them."""\n')


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if the list is not as it should be, unless it is written."""
    parser = argparse.ArgumentParser(prog="python -m tools.operators", description=__doc__)
    parser.add_argument("--write", action="store_true", help="add what is missing and has no objection")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the coverage records")
    options = parser.parse_args(arguments)
    lacking = sorted(emitted(options.records) - OPERATORS)
    wrong = {name: why for name in sorted(OPERATORS | set(lacking)) if (why := objection(name)) is not None}
    for name in lacking:
        print(f"not listed: {name}")
    for name, why in wrong.items():
        print(f"not to be listed: {name}: {why}")
    if options.write:
        write((OPERATORS | set(lacking)) - wrong.keys())
        return 0
    return 1 if wrong or lacking else 0


if __name__ == "__main__":
    sys.exit(main())
