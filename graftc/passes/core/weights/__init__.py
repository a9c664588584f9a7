"""The Store, weight slices and folds: tensors, and changes to their values.

Only the Store owns tensors; base tensors are never written.
"""
