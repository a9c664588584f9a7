"""PET spec files: patterns, verbalizers, and the training of an ensemble's models and the final one. No torch."""
