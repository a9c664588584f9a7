"""Fold adaptations into base tensors, with evidence that the fold is right.

`fold_plan` decides which adaptations fold, and `steps` defines how. `fold_group` folds some tensors, which come from a
model or from files, and compares the result with the unfolded graph; `certify` does this for all tensors of a model.
"""
