"""PET and iPET: rows of data as cloze questions, computations on members' logits, and the recipe as a whole.

The compiled models that answer the questions are those of any spec with ``cloze:``.
"""
