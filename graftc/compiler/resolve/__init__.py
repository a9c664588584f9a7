"""Resolution of a spec on a graph: target sites, compositions, added tokens, untied weights and token embeddings.

`selection` offers the places that a target would select as a value, before a spec exists.
"""
