"""Export models to ONNX, ``.pt2`` and GGUF; each export is checked after writing, then renamed into place."""
