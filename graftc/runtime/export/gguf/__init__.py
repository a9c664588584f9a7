"""Export to GGUF, the format of llama.cpp and Ollama: merged models, and LoRA adapters for a base in that format.

`families` contains the table of model types, `writing` writes the file, `model` and `adapter` define its content,
`vocabulary` writes a tokenizer, and `exporting` implements the format ``gguf``.
"""
