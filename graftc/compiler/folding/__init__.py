"""Folding adaptations into base tensors, and the evidence that a fold is right."""
