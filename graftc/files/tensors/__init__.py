"""Tensor files of any origin: which files may be read and contain a folder's weights, their headers, their tensors."""
