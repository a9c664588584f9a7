"""Record what every contract class compiles to: graphs, their text, initial tensors and folded tensors, as digests.

``python -m tests.frozen.freeze`` writes ``frozen.json`` anew, which `tests/frozen/test_frozen.py` compares with. Do so
where graphs or tensors are meant to change, and look at the difference before committing it. A run that was stopped
goes on with ``--resume``, and ``--only REGEX`` records some entries and keeps the others. All takes six minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.fold_plan import fold_plan
from graftc.passes.core.ir.printer import Printer, format_program, structural_hash
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Mode, Stage
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import MethodContract

HERE = Path(__file__).parent
FILE = HERE / "frozen.json"
METHODS = HERE.parent / "methods"
AGAIN = "python -m tests.frozen.freeze"

GRAPHS: tuple[tuple[str, Mode, Stage], ...] = (
    ("base.train", "train", "base"),
    ("base.eval", "eval", "base"),
    ("train", "train", "adapted"),
    ("eval", "eval", "adapted"),
)
"""The graphs whose structure is recorded; of the adapted ones the text is recorded too."""

NUMBERS = frozenset({"initial", "folded"})
"""Fields with digests of values: another processor may round in another way."""

UNORDERED = frozenset({"test_wide.TestLoRAByRole.gemma3"})
"""Entries whose model goes through a set of strings: the order of what it computes there is another in each process.
Of their text, lines are taken without numbers and sorted."""

Record = dict[str, str]


class Entry(NamedTuple):
    """A contract class on one family.

    Attributes:
        module: the test file's stem.
        contract: the class.
        family: one of its families.
    """

    module: str
    contract: type[MethodContract]
    family: str

    def __str__(self) -> str:
        return f"{self.module}.{self.contract.__qualname__}.{self.family}"


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
    every = (Entry(stem, contract, family) for stem, contract in contracts() for family in contract.families)
    return {str(entry): entry for entry in every}


def record(entry: Entry) -> Record:
    """Compile and perturb an entry's model, and tell what came of it.

    Returns:
        ``graph.*``: structural hashes, of the base's graphs too. ``text.*``: digests of the adapted graphs' text.
        ``initial``: of the adapter tensors as compiling makes them. ``folded``: of the perturbed model's folded
        tensors, in the base's dtype, or the code of the error that says why it does not fold.
    """
    torch.manual_seed(0)
    contract = entry.contract()
    compiled = contract.compiled(entry.family, contract.model(entry.family))
    compilation = compiled.compilation
    found: Record = {}
    for name, mode, stage in GRAPHS:
        program = compilation.program(mode, stage)
        found[f"graph.{name}"] = structural_hash(program, compilation.store.canonical)
        if stage == "adapted":
            found[f"text.{name}"] = _short(_text(program, ordered=str(entry) not in UNORDERED))
    found["initial"] = tensors_digest(compiled.adapter_state_dict().items())
    contract.perturb(entry.family, compiled)
    found["folded"] = _folded(compilation)
    return found


@torch.no_grad()
def _folded(compilation: Compilation) -> str:
    try:
        fold = fold_plan(compilation)
        for error in fold.kept.values():
            raise error
        lazy = fold.lazy
        return tensors_digest((name, lazy.folded(name)) for name in (*lazy.names, *lazy.additions()))
    except GraftError as error:
        return error.code


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, types, shapes and bytes; the order of the tensors makes no difference."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        own = tensor.detach().contiguous()
        whole.update(f"{name}:{own.dtype}:{list(own.shape)}\n".encode())
        whole.update(own.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()[:16]


def _text(program: Program, *, ordered: bool) -> str:
    return format_program(program) if ordered else "\n".join(sorted(Printer(program, numbered=False).lines()))


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def made_with() -> Record:
    """What else the records depend on: versions, and for values the processor."""
    cpu = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {_rounding()}"
    return {"cpu": cpu, "torch": torch.__version__, "transformers": transformers.__version__}


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
    return tensors_digest((str(number), tensor) for number, tensor in enumerate(found))[:8]


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
    parser.add_argument("--file", type=Path, default=FILE, help="where to write; by default %(default)s")
    chosen = parser.parse_args(arguments)
    every = entries()
    wanted = {name: entry for name, entry in every.items() if re.search(chosen.only, name)}
    kept: dict[str, Record] = {}
    if (chosen.only or chosen.resume) and chosen.file.is_file():
        made, kept = read(chosen.file)
        if made != made_with():
            sys.exit(f"{chosen.file} was made with {made}, here is {made_with()}: record everything")
        kept = {name: found for name, found in kept.items() if name in every}
    if chosen.resume:
        wanted = {name: entry for name, entry in wanted.items() if name not in kept}
    started = written = time.monotonic()
    for number, (name, entry) in enumerate(wanted.items(), 1):
        kept[name] = record(entry)
        now = time.monotonic()
        print(f"[{number}/{len(wanted)}] {now - started:.0f} s  {name}", flush=True)
        if now - written > 20:
            chosen.file.write_text(to_json(made_with(), kept), encoding="utf-8")
            written = now
    chosen.file.write_text(to_json(made_with(), kept), encoding="utf-8")
    print(f"{chosen.file}: {len(kept)} entries")


if __name__ == "__main__":
    main()
