"""PET and iPET: data rows as cloze questions, computations on the members' logits, and the complete recipe.

Any spec with ``cloze:`` compiles to a model that answers such questions.
"""
