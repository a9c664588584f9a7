"""Calls to the elements of a model that is split into elements: descriptions of the calls as text, and caches."""
