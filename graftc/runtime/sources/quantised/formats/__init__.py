"""Formats of quantised checkpoints, one file each: where codes, scales and zero points are, and what they mean."""
