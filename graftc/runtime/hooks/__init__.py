"""Users' hooks on layers, on modules within them, and on the embedding table of a compiled model.

Hooks receive the same values as in the source model. Nothing here depends on Runners; `runtime/model` calls this code.
"""
