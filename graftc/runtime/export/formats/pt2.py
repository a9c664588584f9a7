"""The format ``pt2``: torch's serialised programs."""

from graftc.runtime.export.exporter import Exporter, LazyFunction
from graftc.runtime.export.graph_options import EXAMPLE_INPUTS, INPUTS, beside_graph

EXPORTER = Exporter(
    "pt2",
    "One graph that torch.export.load reads",
    (EXAMPLE_INPUTS, INPUTS),
    write=LazyFunction("graftc.runtime.export.pt2:write"),
    prepare=LazyFunction("graftc.runtime.export.pt2:prepare"),
    companions=beside_graph,
)
