"""The built-in formats, each declared in a separate file without loading torch."""

BUILT_IN = ("onnx", "onnx-generate", "onnx-adapter", "pt2", "gguf", "peft")
"""The formats' names, in the order in which they are listed. A module named after each defines its ``EXPORTER``."""
