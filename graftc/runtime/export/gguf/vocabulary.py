"""Write a base's tokenizer in the form that llama.cpp reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from graftc.files.tensors.foreign_folders import TOKENIZER_BYTES, require_regular_files
from graftc.specs.errors.border import library_errors
from graftc.specs.regular_files import read_regular

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITTERS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
"""llama.cpp's names for methods of splitting text before encoding, by the regular expression in ``tokenizer.json``."""


def add_vocabulary(writer: Any, gguf: Any, folder: Path | None, size: int) -> str | None:
    """Add a base's tokenizer to a file.

    Args:
        writer: the writer of the file.
        gguf: the package.
        folder: the base's folder; None if there is none.
        size: the number of rows of the model's embedding table.

    Returns:
        The reason why the file has no tokenizer; None if it has one.
    """
    file = None if folder is None else folder / "tokenizer.json"
    if folder is None or file is None or not file.is_file():
        writer.add_tokenizer_model("no_vocab")
        return "the base has no tokenizer.json"
    require_regular_files(folder, "GC060")
    with library_errors("GC060", f"the tokenizer of {folder} cannot be read"):
        data = json.loads(read_regular(file, TOKENIZER_BYTES))
        return _added(writer, gguf, folder, data, size)


def _added(writer: Any, gguf: Any, folder: Path, data: dict[str, Any], size: int) -> str | None:
    model = data["model"]
    if model.get("type") != "BPE":
        writer.add_tokenizer_model("no_vocab")
        return f"its tokenizer is of type {model.get('type')}, but only byte-pair encodings are supported"
    if model.get("byte_fallback"):
        vocabulary = gguf.LlamaHfVocab(folder)
        tokens, scores, types = (list(column) for column in zip(*vocabulary.all_tokens(), strict=True))
        if len(tokens) > size:
            raise ValueError(f"{len(tokens)} tokens, but {size} embeddings")
        missing = size - len(tokens)
        tokens += [f"[PAD{number}]".encode() for number in range(len(tokens), size)]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([*scores, *(-1000.0 for _ in range(missing))])
        writer.add_token_types([*types, *(gguf.TokenType.UNUSED for _ in range(missing))])
    else:
        splitter = _splitter(data)
        if splitter is None:
            writer.add_tokenizer_model("no_vocab")
            return "its tokenizer splits texts in an unknown way"
        tokens, types = _byte_level(gguf, data, size)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=not model.get("byte_fallback"), n_vocab=size).add_to_gguf(writer, quiet=True)
    return None


def _splitter(data: dict[str, Any]) -> str | None:
    steps = data.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [
        step["pattern"]["Regex"] for step in steps if step.get("type") == "Split" and "Regex" in step["pattern"]
    ]
    if patterns:
        return _SPLITTERS.get(patterns[0]) if len(patterns) == 1 else None
    plain = [step for step in steps if step.get("type") == "ByteLevel" and step.get("use_regex", True)]
    return "gpt-2" if len(plain) == len(steps) == 1 else None


def _byte_level(gguf: Any, data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Return the tokens in the order of their ids, and each one's kind; ids without a token are marked as unused."""
    by_number = {number: token for token, number in data["model"]["vocab"].items()}
    kinds = {number: gguf.TokenType.NORMAL for number in by_number}
    for token in data.get("added_tokens", []):
        by_number[token["id"]] = token["content"]
        kinds[token["id"]] = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
    if max(by_number) >= size:
        raise ValueError(f"token number {max(by_number)}, but {size} embeddings")
    numbers = range(size)
    tokens = [by_number.get(number, f"[PAD{number}]") for number in numbers]
    return tokens, [int(kinds.get(number, gguf.TokenType.UNUSED)) for number in numbers]
