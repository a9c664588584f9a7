"""Record what every contract class compiles to, and banks, other calls and quantised bases, as digests: graphs,
histories, tensors, outputs, gradients, folds and certificates.

``python -m tests.frozen.freeze`` writes ``frozen.json`` anew, which `tests/frozen/test_frozen.py` compares with. Do so
where something is meant to change, and look at the difference before committing it. ``--to FILE`` writes another file,
with which the tests compare where ``GRAFTC_FROZEN=FILE``. A run that was stopped goes on with ``--resume``, and
``--only REGEX`` records some entries and keeps the others. All takes twelve minutes of one processor.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from graftc.testing import MethodContract
from graftc.testing.contract import Contract
from tests.frozen.contracts import FromSpec, others
from tests.frozen.digests import tensors_digest
from tests.frozen.records import Record, one_thread, record

HERE = Path(__file__).parent
FILE = HERE / "frozen.json"
METHODS = HERE.parent / "methods"
AGAIN = "python -m tests.frozen.freeze"

UNORDERED = frozenset({"test_wide.TestLoRAByRole.gemma3"})
"""Entries whose model goes through a set of strings: the order of what it computes there is another in each process.
Of their text, lines are taken without numbers and sorted."""


class Entry(NamedTuple):
    """A contract on one family.

    Attributes:
        name: what it is recorded as.
        contract: says what is compiled.
        family: one of its families.
    """

    name: str
    contract: Contract
    family: str

    def record(self) -> Record:
        """What it is now."""
        options = vars(self.contract) if isinstance(self.contract, FromSpec) else {}
        own = {name: options[name] for name in ("slots", "generates", "merging") if name in options}
        return record(self.contract, self.family, ordered=self.name not in UNORDERED, **own)


def contracts() -> list[tuple[str, type[MethodContract]]]:
    """Every class of ``tests/methods`` that pytest collects with the contract of methods, and its file's stem."""
    found: list[tuple[str, type[MethodContract]]] = []
    for path in sorted(METHODS.glob("test_*.py")):
        if "MethodContract" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"tests.methods.{path.stem}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, MethodContract)]
        own = (c for c in classes if c.__module__ == module.__name__ and c.__name__.startswith("Test"))
        found += [(path.stem, contract) for contract in own]
    return found


def entries() -> dict[str, Entry]:
    """All that is recorded, by name."""
    of_methods = [
        (f"{stem}.{contract.__qualname__}", contract(), family)
        for stem, contract in contracts()
        for family in contract.families
    ]
    every: list[tuple[str, Contract, str]] = [*of_methods, *others()]
    return {f"{name}.{family}": Entry(f"{name}.{family}", contract, family) for name, contract, family in every}


def made_with() -> Record:
    """What else the records depend on: versions, and for values the processor."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_rounding()}"
    return {"cpu": cpu, "torch": torch.__version__, "transformers": transformers.__version__}


@one_thread()
def _rounding() -> str:
    """A digest of products, sums and decompositions: two processors of one name and one instruction set may add up in
    other orders."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.float64, torch.float32):
        a, b = (torch.randn(size, generator=rng, dtype=dtype) for size in ((48, 33), (33, 96)))
        found += [
            a @ b,
            torch.addmm(torch.zeros(48, 96, dtype=dtype), a, b),
            a.square().sum(-1),
            torch.linalg.svd(a)[1],
        ]
        found += [a[:, :2] @ b[:2], a[:, :8] @ b[:8], torch.linalg.qr(a)[1]]
    return tensors_digest((str(number), tensor) for number, tensor in enumerate(found)).split()[-1][:8]


class Frozen(NamedTuple):
    """What the file holds.

    Attributes:
        made: what it was made with, as `made_with` says.
        records: by the entries' names.
    """

    made: Record
    records: dict[str, Record]


def read(path: Path = FILE) -> Frozen:
    """The recorded state."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Frozen(data["made"], data["records"])


def to_json(made: Mapping[str, str], records: Mapping[str, Mapping[str, str]]) -> str:
    """The file's text: one line an entry, sorted."""
    lines = (f"{json.dumps(name)}: {json.dumps(dict(sorted(records[name].items())))}" for name in sorted(records))
    return f'{{"made": {json.dumps(dict(sorted(made.items())))},\n"records": {{\n' + ",\n".join(lines) + "\n}}\n"


def main(arguments: list[str] | None = None) -> None:
    """Record, telling how far it is."""
    parser = argparse.ArgumentParser(prog=AGAIN, description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="record these entries and keep the others")
    parser.add_argument("--resume", action="store_true", help="keep what is in the file and record what is missing")
    parser.add_argument("--to", type=Path, default=FILE, metavar="FILE", help="where to write; by default %(default)s")
    chosen = parser.parse_args(arguments)
    every = entries()
    wanted = {name: entry for name, entry in every.items() if re.search(chosen.only, name)}
    kept: dict[str, Record] = {}
    if (chosen.only or chosen.resume) and chosen.to.is_file():
        made, kept = read(chosen.to)
        if made != made_with():
            sys.exit(f"{chosen.to} was made with {made}, here is {made_with()}: record everything")
        kept = {name: found for name, found in kept.items() if name in every}
    if chosen.resume:
        wanted = {name: entry for name, entry in wanted.items() if name not in kept}
    started = written = time.monotonic()
    for number, (name, entry) in enumerate(wanted.items(), 1):
        kept[name] = entry.record()
        now = time.monotonic()
        print(f"[{number}/{len(wanted)}] {now - started:.0f} s  {name}", flush=True)
        if now - written > 20:
            chosen.to.write_text(to_json(made_with(), kept), encoding="utf-8")
            written = now
    chosen.to.write_text(to_json(made_with(), kept), encoding="utf-8")
    print(f"{chosen.to}: {len(kept)} entries")


if __name__ == "__main__":
    main()
