"""Files and folders that anybody may have written or may be writing: destinations, staging, tensors. No models.

Most of it imports no torch.
"""
