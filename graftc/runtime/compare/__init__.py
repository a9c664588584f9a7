"""Compare two model folders tensor by tensor, without loading a model: which tensors differ, by how much, and the
likely cause. `folders` iterates over the tensors, `difference` measures one tensor, and `rank` estimates the rank of a
difference.
"""
