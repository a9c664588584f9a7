"""Run a source model and its graph on the same inputs, for the anchor to compare."""
