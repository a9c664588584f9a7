"""Identities of models, and digests of the code that they run, from which the keys of kept captures are made."""
