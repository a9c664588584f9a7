"""Tensor files of any origin: which may be read and are a folder's weights, their headers, and their tensors."""
