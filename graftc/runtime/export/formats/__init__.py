"""The built-in formats: one file per format, which declares it without loading torch."""

BUILT_IN = ("onnx", "onnx-generate", "pt2", "gguf", "peft")
"""The formats' names, in the order of listings. Each has a module with its name, which defines ``EXPORTER``."""
