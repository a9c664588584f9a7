"""Base models and where they come from: folders, hub ids, callables, quantised checkpoints, processors beside them.

Everything is checked before a library reads it.
"""
