"""The specs of the methods: one file for each, found by its tag; no torch.

The code is in the file of the same name in `graftc.passes.methods`.
"""
