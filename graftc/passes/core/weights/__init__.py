"""The Store, weight slices and folds: tensors, and changes of their values.

Only the Store owns tensors; base tensors are never written.
"""
