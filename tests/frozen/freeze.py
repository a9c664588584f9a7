"""Record digests of what every contract class compiles to, and of banks, other calls and quantised bases.

The digests are of graphs, histories, tensors, outputs, gradients, folds and certificates.

``python -m tests.frozen.freeze`` rewrites ``frozen.json``, which `tests/frozen/test_frozen.py` compares with. Run it
after an intended change, and review the difference before committing it. ``--to FILE`` writes another file, which the
tests compare with if ``GRAFTC_FROZEN=FILE`` is set. ``--resume`` continues a run that was stopped, and ``--only REGEX``
records some entries and keeps the others. Everything takes twelve minutes of one processor.
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
from tests.frozen.records import Record, record
from tests.kit.settings import one_thread

HERE = Path(__file__).parent
FILE = HERE / "frozen.json"
METHODS = HERE.parent / "passes" / "methods"
AGAIN = "python -m tests.frozen.freeze"

UNORDERED = frozenset({"test_wide.TestLoRAByRole.gemma3"})
"""Entries whose model goes through a set of strings: the order of what it computes there is another in each process.
Of their text, lines are taken without numbers and sorted."""


class Entry(NamedTuple):
    """A contract on one family.

    Attributes:
        name: the name that it is recorded under.
        contract: the contract that compiles the model.
        family: one of the contract's families.
    """

    name: str
    contract: Contract
    family: str

    def record(self) -> Record:
        """Return the current record."""
        options = vars(self.contract) if isinstance(self.contract, FromSpec) else {}
        own = {name: options[name] for name in ("slots", "generates", "merging") if name in options}
        return record(self.contract, self.family, ordered=self.name not in UNORDERED, **own)


def contracts() -> list[tuple[str, type[MethodContract]]]:
    """Return the contract classes that pytest collects from ``tests/passes/methods``, each with its file's stem."""
    collected: list[tuple[str, type[MethodContract]]] = []
    for path in sorted(METHODS.glob("test_*.py")):
        if "MethodContract" not in path.read_text(encoding="utf-8"):
            continue
        module = importlib.import_module(f"tests.passes.methods.{path.stem}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, MethodContract)]
        own = (c for c in classes if c.__module__ == module.__name__ and c.__name__.startswith("Test"))
        collected += [(path.stem, contract) for contract in own]
    return collected


def entries() -> dict[str, Entry]:
    """Return everything that is recorded, by name."""
    of_methods = [
        (f"{stem}.{contract.__qualname__}", contract(), family)
        for stem, contract in contracts()
        for family in contract.families
    ]
    every: list[tuple[str, Contract, str]] = [*of_methods, *others()]
    return {f"{name}.{family}": Entry(f"{name}.{family}", contract, family) for name, contract, family in every}


def made_with() -> Record:
    """Return what the records depend on otherwise: versions and, for values, the processor."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_rounding()}"
    return {"cpu": cpu, "torch": torch.__version__, "transformers": transformers.__version__}


@one_thread()
def _rounding() -> str:
    """Return a digest of products, sums and decompositions.

    Even processors with the same name and instruction set may add in different orders.
    """
    rng = torch.Generator().manual_seed(0)
    results = []
    for dtype in (torch.float64, torch.float32):
        a, b = (torch.randn(size, generator=rng, dtype=dtype) for size in ((48, 33), (33, 96)))
        results += [
            a @ b,
            torch.addmm(torch.zeros(48, 96, dtype=dtype), a, b),
            a.square().sum(-1),
            torch.linalg.svd(a)[1],
        ]
        results += [a[:, :2] @ b[:2], a[:, :8] @ b[:8], torch.linalg.qr(a)[1]]
    return tensors_digest((str(number), tensor) for number, tensor in enumerate(results)).split()[-1][:8]


CPU = "cpu"
"""The field with the processor: of the environment, and of records that were made on another one."""


class Frozen(NamedTuple):
    """The contents of the file.

    Attributes:
        environment: what it was made with, as `made_with` returns it.
        records: the records by the entries' names.
    """

    environment: Record
    records: dict[str, Record]


def read(path: Path = FILE) -> Frozen:
    """Read the recorded state."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Frozen(data["made"], data["records"])


def to_json(environment: Mapping[str, str], records: Mapping[str, Mapping[str, str]]) -> str:
    """Return the file's text, with one sorted line for each entry."""
    lines = (f"{json.dumps(name)}: {json.dumps(dict(sorted(records[name].items())))}" for name in sorted(records))
    return f'{{"made": {json.dumps(dict(sorted(environment.items())))},\n"records": {{\n' + ",\n".join(lines) + "\n}}\n"


def main(arguments: list[str] | None = None) -> None:
    """Record the entries and report progress."""
    parser = argparse.ArgumentParser(prog=AGAIN, description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="record these entries and keep the others")
    parser.add_argument("--resume", action="store_true", help="keep what is in the file and record what is missing")
    parser.add_argument("--to", type=Path, default=FILE, metavar="FILE", help="where to write; by default %(default)s")
    chosen = parser.parse_args(arguments)
    every = entries()
    wanted = {name: entry for name, entry in every.items() if re.search(chosen.only, name)}
    kept: dict[str, Record] = {}
    environment, elsewhere = made_with(), {}
    if (chosen.only or chosen.resume) and chosen.to.is_file():
        environment, kept = read(chosen.to)
        if {**environment, CPU: made_with()[CPU]} != made_with():
            sys.exit(f"{chosen.to} was made with {environment}, here is {made_with()}: record everything")
        elsewhere = {CPU: made_with()[CPU]} if environment != made_with() else {}
        kept = {name: fields for name, fields in kept.items() if name in every}
    if chosen.resume:
        wanted = {name: entry for name, entry in wanted.items() if name not in kept}
    started = written = time.monotonic()
    for number, (name, entry) in enumerate(wanted.items(), 1):
        kept[name] = {**entry.record(), **elsewhere}
        now = time.monotonic()
        print(f"[{number}/{len(wanted)}] {now - started:.0f} s  {name}", flush=True)
        if now - written > 20:
            chosen.to.write_text(to_json(environment, kept), encoding="utf-8")
            written = now
    chosen.to.write_text(to_json(environment, kept), encoding="utf-8")
    print(f"{chosen.to}: {len(kept)} entries")


if __name__ == "__main__":
    main()
