"""Capture of a model as base graphs: tracing, the cache, the anchor, inputs and signatures. Independent of any spec."""
