"""Formats of quantised checkpoints, one file each: the locations and meanings of codes, scales and zero points."""
