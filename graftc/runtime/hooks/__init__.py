"""User hooks on a compiled model's layers, on modules within those layers, and on its embedding table.

Hooks receive the same values as in the source model. Nothing here depends on Runners; `runtime/model` calls this code.
"""
