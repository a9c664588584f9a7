"""The format ``gguf``, which llama.cpp and Ollama read."""

from typing import Any, Literal, TypeAlias, get_args

from graftc.runtime.export.exporter import Exporter, ExportOption, LazyFunction
from graftc.runtime.serving.engines import GGUF_ENGINES, engine_of
from graftc.specs.errors.diagnostics import GraftError

FileType: TypeAlias = Literal["f32", "f16", "bf16"]
"""The element types of the matrices in a file."""


def file_type(given: Any) -> FileType:
    """Return the given element type if a file may have it.

    Raises:
        GraftError: GC060 for an unknown type.
    """
    types: tuple[FileType, ...] = get_args(FileType)
    if given not in types:
        raise GraftError("GC060", f"the type {given!r} is unknown", hint=f"the types are {', '.join(types)}")
    return given  # type: ignore[no-any-return]


DTYPE = ExportOption(
    "dtype",
    "Type of the matrices in a GGUF file, by default the engine's or f32",
    get_args(FileType),
    file_type,
    flag="--dtype",
)
ENGINE = ExportOption(
    "server",
    "Write a GGUF file that an engine computes correctly",
    GGUF_ENGINES,
    lambda name: engine_of(name, "gguf-model"),
    flag="--for",
)
EXPORTER = Exporter(
    "gguf",
    "A merged model for llama.cpp, or the LoRAs of an unmerged one as an adapter for it",
    (DTYPE, ENGINE),
    write=LazyFunction("graftc.runtime.export.gguf.exporting:write"),
    check=LazyFunction("graftc.runtime.export.gguf.exporting:check"),
    prepare=LazyFunction("graftc.runtime.export.gguf.exporting:prepare"),
    content="either",
    instead={"inputs": "leave it out: the LoRAs of an unmerged model are exported as a separate file"},
)
