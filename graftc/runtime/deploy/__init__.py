"""Folding for deployment: merged models and their folders, partial merges, combined adaptations.

The live model is never changed."""
