"""PET spec files: patterns, verbalizers, and how the models of an ensemble and the final one train. No torch."""
