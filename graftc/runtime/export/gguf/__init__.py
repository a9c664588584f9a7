"""GGUF, the format of llama.cpp and Ollama: merged models, and LoRA adapters beside a base in that format.

`families` contains the table of model types, `writing` writes the file, `model` and `adapter` define its content, and
`vocabulary` writes a tokenizer.
"""

from graftc.runtime.export.gguf.adapter import export_adapter
from graftc.runtime.export.gguf.model import export_merged

__all__ = ["export_adapter", "export_merged"]
