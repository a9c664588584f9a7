"""GGUF, the format of llama.cpp and Ollama: merged models, and LoRA adapters beside a base in that format.

`families` has the table of model types, `writing` the file, `model` and `adapter` say what goes in, `vocabulary` writes
a tokenizer.
"""

from graftc.runtime.export.gguf.adapter import export_adapter
from graftc.runtime.export.gguf.model import export_merged

__all__ = ["export_adapter", "export_merged"]
