"""The format ``gguf``, which llama.cpp and Ollama read."""

from typing import Literal, TypeAlias, get_args

from graftc.runtime.export.exporter import Exporter, ExportOption, LazyFunction
from graftc.runtime.serving.engines import GGUF_ENGINES, engine_of

FileType: TypeAlias = Literal["f32", "f16", "bf16"]
"""The element types of the matrices in a file."""


DTYPE = ExportOption(
    "dtype", "Type of the matrices in a GGUF file, by default the engine's or f32", get_args(FileType), flag="--dtype"
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
