"""The format ``onnx-generate``: ONNX graphs with a cache of keys and values, for generation."""

from graftc.runtime.export.exporter import Exporter, LazyFunction
from graftc.runtime.export.graph_options import ADAPTER_FORMAT, INPUTS, LOGITS, OPSET

EXPORTER = Exporter(
    "onnx-generate",
    "A folder of graphs with a cache, for generation with ONNX Runtime",
    (INPUTS, ADAPTER_FORMAT, LOGITS, OPSET),
    write=LazyFunction("graftc.runtime.export.cached:write"),
    check=LazyFunction("graftc.runtime.export.cached:check"),
    prepare=LazyFunction("graftc.runtime.export.cached:prepare"),
    replaceable=LazyFunction("graftc.runtime.export.cached:is_exported"),
    instead={
        "example_inputs": "leave it out: the inputs of graphs for generation are fixed",
    },
)
