"""Capture a model as base graphs, independently of any spec: tracing, the cache, the anchor, inputs and signatures."""
