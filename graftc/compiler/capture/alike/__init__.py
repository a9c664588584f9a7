"""Layers that are alike: one of each kind is traced, and the others are written as calls of it."""
