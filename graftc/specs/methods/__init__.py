"""Specs of the methods: one file per method, found by its tag; no torch.

The code is in the file of the same name in `graftc.passes.methods`.
"""
