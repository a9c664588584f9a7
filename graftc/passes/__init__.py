"""How a graph is rewritten: one file per method, and the passes that know no method."""
