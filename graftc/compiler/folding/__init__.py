"""Folding adaptations into base tensors, and the evidence that a fold is right.

`fold_plan` decides what folds, `steps` describes how; `certify` compares the result with the unfolded graph.
"""
