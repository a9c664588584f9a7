"""The coverage of graftc over the architectures of the installed transformers: ``python -m tools.coverage``."""
