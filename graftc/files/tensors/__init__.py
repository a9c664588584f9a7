"""Tensor files of any origin: which files contain a folder's weights and may be read, their headers, their tensors."""
