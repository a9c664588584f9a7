"""Calls of the elements of a model that is taken apart: by the text of a flag, and with a cache of their own."""
