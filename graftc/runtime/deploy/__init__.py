"""Fold for deployment: merged models and their folders, partial merges, and combined or converted adaptations.

The live model is never changed.
"""
