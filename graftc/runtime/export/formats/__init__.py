"""The built-in formats, one file per format, which declares it and loads no torch."""

BUILT_IN = ("onnx", "onnx-generate", "pt2", "gguf", "peft")
"""Their names, in the order of listings. Each one's module has its name, and an ``EXPORTER``."""
