"""What holds tensors and changes their values: the Store, weight slices and folds.

The Store alone owns tensors; base tensors are never written."""
