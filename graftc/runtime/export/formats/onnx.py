"""The format ``onnx``: one graph."""

from graftc.runtime.export.exporter import Exporter, LazyFunction
from graftc.runtime.export.graph_options import ADAPTER_FORMAT, EXAMPLE_INPUTS, INPUTS, OPSET, beside_graph

EXPORTER = Exporter(
    "onnx",
    "One graph for ONNX Runtime",
    (EXAMPLE_INPUTS, INPUTS, ADAPTER_FORMAT, OPSET),
    write=LazyFunction("graftc.runtime.export.onnx:write"),
    check=LazyFunction("graftc.runtime.export.onnx:check"),
    prepare=LazyFunction("graftc.runtime.export.onnx:prepare"),
    companions=beside_graph,
)
