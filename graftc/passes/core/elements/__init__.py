"""Calls of the elements of a model that is split into elements: their description as text, and their caches."""
