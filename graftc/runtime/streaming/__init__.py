"""Merging and verifying checkpoints as files, shard by shard, without a model: `merging` and `verifying` do the work.

Nothing is captured or loaded; base files are read where they lie and never written."""
