"""Small tokenizers of the kinds that models use."""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LETTERS = string.ascii_letters
MARKS = string.digits + string.punctuation
WORDS = ["about", "and", "bad", "game", "good", "great", "hockey", "is", "it", "no", "of", "or", "space", "sports"]
WORDS += ["team", "terrible", "text", "this", "was", "won", "yes"]
CORPUS = [
    "This text is about space and hockey, or about sports.",
    "Topic: hockey. The team won the game. Topic: space. The rocket was great!",
    "It was great. It was terrible. Was it good or bad? (yes) no",
    *["yes", "no", "The", "It", "great", "terrible", "It was yes and no", "so great and so terrible"] * 4,
    "about great terrible good bad space hockey sports yes no rocket team won the game",
] * 20


def _wrapped(backend: Tokenizer, types: bool = False, **special: Any) -> Any:
    names = ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=names, **special)


def _around(backend: Tokenizer, first: str | None, last: str | None) -> None:
    single = " ".join([*([first] if first else []), "$A", *([last] if last else [])])
    specials = [(token, backend.token_to_id(token)) for token in (first, last) if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=specials)


def wordpiece() -> Any:
    """A lower-case tokenizer of word pieces, like BERT's."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *LETTERS.lower(), *(f"##{c}" for c in LETTERS.lower()), *MARKS, *WORDS, "topic", "the", "##s"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _around(backend, "[CLS]", "[SEP]")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _wrapped(backend, types=True, mask_token="[MASK]", **names)


def _bytes(special: list[Any]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def roberta() -> Any:
    """A byte-level tokenizer with a mask token that absorbs the space before it."""
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)
    backend = _bytes(["<s>", "<pad>", "</s>", "<unk>", mask])
    ends = [("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return _wrapped(backend, mask_token=mask, **names)


def gpt2() -> Any:
    """A byte-level tokenizer without any token for blanks or padding."""
    backend = _bytes(["<|endoftext|>"])
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _wrapped(backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>")


def llama() -> Any:
    """A tokenizer of pieces, with a token at both ends of a text."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    words = [word.strip(".,:!?()") for text in CORPUS for word in text.split()]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False))
    _around(backend, "<s>", "</s>")
    return _wrapped(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def t5() -> Any:
    """A unigram tokenizer with sentinels."""
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    pieces = [("▁", -6.0), *((c, -9.0) for c in LETTERS + MARKS), *((f"▁{word}", -4.0) for word in WORDS)]
    backend = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *pieces], unk_id=2))
    backend.add_special_tokens(special)
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    _around(backend, None, "</s>")
    return _wrapped(backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


_MAKERS: dict[str, Callable[[], Any]] = {f.__name__: f for f in (wordpiece, roberta, gpt2, llama, t5)}
KINDS = {"wordpiece": "mask", "roberta": "mask", "gpt2": "last", "llama": "last", "t5": "sentinel"}
"""Of each tokenizer, what a blank is."""


@cache
def tokenizer(name: str) -> Any:
    """Return the tokenizer of that name, built only once."""
    return _MAKERS[name]()
