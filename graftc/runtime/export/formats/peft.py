"""The format ``peft``: folders of adapters that PEFT loads."""

from __future__ import annotations

from typing import Any

from graftc.runtime.export.exporter import Exporter, ExportOption, LazyFunction
from graftc.runtime.serving.engines import PEFT_ENGINES, engine_of
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError


def _positive(rank: Any) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        shown = kind_of(rank) if not isinstance(rank, int) else repr(rank)
        raise GraftError("GC073", f"max_rank must be a positive integer, got {shown}", hint="pass a positive integer")
    return rank


SERVER = ExportOption(
    "server",
    "Write a PEFT folder that a server can load, within the server's limits",
    PEFT_ENGINES,
    lambda name: engine_of(name, "peft"),
    flag="--for",
)
MAX_RANK = ExportOption(
    "max_rank", "The largest rank that the server was started with", read=_positive, flag="--max-rank"
)
EXPORTER = Exporter(
    "peft",
    "The adapters alone, as a folder that PEFT loads",
    (SERVER, MAX_RANK),
    write=LazyFunction("graftc.runtime.export.peft:write"),
    check=LazyFunction("graftc.runtime.export.peft:check"),
    prepare=LazyFunction("graftc.runtime.export.peft:prepare"),
    content="adapters",
    replaceable=LazyFunction("graftc.runtime.interop.peft.exporting:is_exported"),
    instead={"inputs": "leave it out: the folder contains only adapters, and no graph"},
)
