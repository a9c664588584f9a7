"""Merging and verification of checkpoints as files, shard by shard and without a model; see `merging` and `verifying`.

Nothing is captured or loaded. The base's files are read in place and never written.
"""
