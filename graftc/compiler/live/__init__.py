"""Models whose own Python runs between graphs: what of them is a graph, and how it is called."""
