"""Folding for deployment: merged models and their folders, partial merges, and combined adaptations.

The live model is never changed.
"""
