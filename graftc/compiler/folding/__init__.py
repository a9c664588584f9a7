"""Folding adaptations into base tensors, and the evidence that a fold is right.

`fold_plan` decides what folds, `steps` describes how. `fold_group` folds some tensors, from a model or from files, and
compares the result with the unfolded graph; `certify` does that for all tensors of a model.
"""
