"""PET and iPET: rows of data as cloze questions, what is computed from members' logits, and the recipe of it all.

The compiled models that answer the questions are those of any spec with ``cloze:``.
"""
