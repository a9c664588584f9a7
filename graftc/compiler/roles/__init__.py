"""Detect what each part of a graph does from its data flow alone, without specs or names."""
