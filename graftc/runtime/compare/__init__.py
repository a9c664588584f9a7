"""Comparison of two model folders tensor by tensor, without loading a model: which tensors differ, by how much, and
what could have caused it. `folders` walks through them, `difference` measures one tensor, and `rank` estimates how
many directions a difference has.
"""
