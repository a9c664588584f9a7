"""Models whose own Python runs between graphs: which parts of them are graphs, and how these are called."""
