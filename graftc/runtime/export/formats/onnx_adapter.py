"""The format ``onnx-adapter``: adapters for a graph that takes them as inputs."""

from graftc.runtime.export.exporter import Exporter, ExportOption, LazyFunction

GRAPH = ExportOption(
    "graph", "The ONNX file, or the folder of onnx-generate, whose inputs get the values", flag="--for-graph"
)
SLOT = ExportOption("slot", "The graph's adaptation in whose place the artifact's only one goes", flag="--slot")
EXPORTER = Exporter(
    "onnx-adapter",
    "The adapters alone, as values for the inputs of an exported ONNX graph",
    (GRAPH, SLOT),
    write=LazyFunction("graftc.runtime.export.onnx_adapter:write"),
    check=LazyFunction("graftc.runtime.export.onnx_adapter:check"),
    prepare=LazyFunction("graftc.runtime.export.onnx_adapter:prepare"),
    content="adapters",
    instead={"inputs": "leave it out: every adaptation of the model is written"},
)
