"""Training beside the graph: controllers, objectives, callbacks and selection by examples.

Training changes values in the Store; it never changes graphs.
"""
