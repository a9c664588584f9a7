"""How a graph is held, changed, checked and printed, independent of any method."""
