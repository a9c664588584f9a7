"""The format ``onnx-generate``: ONNX graphs with a cache of keys and values, for generation."""

from graftc.runtime.export.exporter import Exporter, LazyFunction

EXPORTER = Exporter(
    "onnx-generate",
    "A folder of graphs with a cache, with which ONNX Runtime generates",
    (),
    write=LazyFunction("graftc.runtime.export.cached:write"),
    check=LazyFunction("graftc.runtime.export.cached:check"),
    prepare=LazyFunction("graftc.runtime.export.cached:prepare"),
    replaceable=LazyFunction("graftc.runtime.export.cached:is_exported"),
    instead={
        "inputs": 'one graph without a cache takes adaptations as inputs: format "onnx"',
        "example_inputs": "the graphs that generate have inputs of their own",
    },
)
