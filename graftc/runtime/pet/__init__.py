"""PET and iPET: what is computed from members' logits, members' training, and the recipe that does all of it.

Texts become cloze questions in `encoding`; the compiled models that answer them are those of any spec with ``cloze:``.
"""
