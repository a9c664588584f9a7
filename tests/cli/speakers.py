"""Tiny language models with tokenizers, as folders."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import graftc
from graftc.runtime.sources.models import load_model, quiet_transformers
from graftc.testing import perturb, tiny

WORDS = ("</s>", "<unk>", "<pad>", "user:", "system:", "assistant:", *(f"w{n}" for n in range(90)))
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPEC: dict[str, Any] = {
    "adapt": [
        {"name": name, "method": "lora", "target": {"role": ["attn.q", "attn.v", "ffn.up"]}, "rank": 2}
        for name in ("one", "two")
    ],
    "compose": [{"bank": ["one", "two"], "name": "both"}],
}


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """Write a tokenizer of words into a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", chat_template=template
    )
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Write a tiny model into a folder; if it is random enough, its generation does not end by itself."""
    with quiet_transformers():
        tiny(family, **changes).save_pretrained(folder)
    return folder


def save_artifact(folder: Path, base: Path) -> Any:
    """Write an artifact with a bank of two different adaptations, and return the compiled model."""
    compiled = graftc.compile(SPEC, load_model(str(base)))
    perturb(compiled, scale=0.3)
    compiled.eval().save(folder, certify=False)
    return compiled


@contextmanager
def heard_interrupts() -> Iterator[None]:
    """Handle interrupts while the block runs, as in a terminal: shells make background processes ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
