"""Take apart models whose own Python code runs between graphs: find the parts that run as graphs, and their calls."""
