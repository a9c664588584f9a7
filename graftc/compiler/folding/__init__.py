"""Folding adaptations into base tensors, and the evidence that a fold is right.

`fold_plan` says what folds, `steps` how; `certify` holds the result against the unfolded graph."""
