"""Options of a spec for the whole model: what a training step keeps in memory, and how its graph is lowered."""
