"""Comparing two model folders tensor by tensor, without loading a model: which differ, by how much, and what could have
made the difference. `folders` walks, `difference` measures one tensor, `rank` says how many directions it has."""
