"""Options of a spec that hold for the whole model."""
