"""Exports: ONNX, ``.pt2`` and GGUF, each checked after writing and renamed into place when it is complete."""
