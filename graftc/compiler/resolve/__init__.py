"""Resolve a spec against a graph: target sites, compositions, added tokens, untied weights and token embeddings.

`selection` represents the places that a target would select, before a spec exists.
"""
