"""Merge and verify checkpoints as files, shard by shard and without a model; see `merging` and `verifying`.

No model is captured or loaded. The base's files are read in place and never written.
"""
