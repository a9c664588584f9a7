"""``python -m tools.operators``: the literal list of operators that a file may name, in
`graftc/passes/core/ir/stored/allowed_operators.py`.

The list is kept in the tree and reviewed there. This holds it against its rules (`objection`), and against what
captures emit: the records of ``make coverage`` have the operators of every architecture. What is missing and has no
objection is added with ``--write``; what has one is never added.
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
"""What arguments may be made of. No file can hold a generator, so that such an argument is always None."""

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
"""What reads or writes files, changes storages and sizes, or names memory by explicit strides; and state of torch's."""


def operator(name: str) -> torch._ops.OpOverload | None:
    """The overload of a name ``namespace.operator.overload``, or None."""
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.rpartition(".")
    if namespace in HOMES:
        importlib.import_module(HOMES[namespace])
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None)
    return found if isinstance(found, torch._ops.OpOverload) else None


def objection(name: str) -> str | None:
    """Why no file may name an operator; None where there is no reason."""
    found = operator(name)
    if found is None:
        return "there is none"
    schema = found._schema
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
    """Operators of all architectures that ``make coverage`` has looked at."""
    found: set[str] = set()
    for file in records.glob("*.json"):
        found.update(json.loads(file.read_text())["record"].get("_operators", ()))
    return {name for name in found if name.split(".")[0] in ("aten", *HOMES)}


def write(names: Iterable[str]) -> None:
    """Put names into the module, sorted."""
    head, _, _ = MODULE.read_text().partition('_NAMES = """')
    body = textwrap.fill(" ".join(sorted(names)), 116, initial_indent="", break_on_hyphens=False)
    MODULE.write_text(f'{head}_NAMES = """\n{body}\n"""\n\nOPERATORS = frozenset(_NAMES.split())\n"""All of them."""\n')


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit status is 1 where the list is not as it should be."""
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
