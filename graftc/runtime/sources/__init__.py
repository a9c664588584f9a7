"""Sources of base models: folders, hub ids, callables, quantised checkpoints, and the processors beside models.

Everything is checked before a library reads it.
"""
