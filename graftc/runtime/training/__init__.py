"""Training support outside the graph: controllers, objectives, callbacks, logs and selection by examples.

Training changes values in the Store, but never the graphs.
"""
