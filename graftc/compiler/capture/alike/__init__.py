"""Trace one of several layers that are alike, and represent the others as calls to it."""
