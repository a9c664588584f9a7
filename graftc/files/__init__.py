"""Files and folders that anyone may have written or may be writing: destinations, staging, tensors. No models.

Most modules do not import torch.
"""
