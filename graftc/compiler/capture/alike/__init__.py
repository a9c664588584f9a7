"""Layers that are alike: which are, what is traced of them, and what is written in the place of the others."""
