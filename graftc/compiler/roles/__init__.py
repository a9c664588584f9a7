"""Detection of what the parts of a graph do, from its data flow alone, independent of specs and names."""
