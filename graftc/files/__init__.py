"""Safe access to files and folders that anyone may have written or may be writing: destinations, staging, tensors.

Nothing here deals with models. Most modules do not import torch.
"""
