"""Users' hooks on layers and on the embedding table of a compiled model.

They get, and may change, what they do in the source model. Nothing here depends on Runners; `runtime/model` calls it.
"""
