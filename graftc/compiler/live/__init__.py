"""Models whose own Python code runs between graphs: find the parts that are graphs, and how these are called."""
