"""The tiny models that the tests run on."""

from __future__ import annotations

from graftc.testing.families import FAMILIES, bert, gpt2, gpt_neox, llama, mixtral, roberta, t5, tiny, vit

__all__ = ["FAMILIES", "bert", "gpt2", "gpt_neox", "llama", "mixtral", "roberta", "t5", "tiny", "vit"]
