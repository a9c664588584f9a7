"""A tokenizer that supports blanks: a placeholder in a text becomes the blank token, and no other text is special."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted, some

BLANK = "\ue000"
"""The private-use character that represents a blank in texts; it is removed from data."""

BlankKind: TypeAlias = Literal["mask", "last", "sentinel"]
"""The kinds of blank: the mask token; the position after the text, for models that generate from left to right; or T5's
sentinel, after which the decoder generates."""

_SENTINEL = "<extra_id_0>"
_CLOSE = 8
"""The maximum number of similar tokens to try for a word."""

_COMPOUND, _SHORTEST = 100, 3
"""The number of leading characters of a word in which to search for shorter words, and the minimum length of these."""


class BlankTokenizer:
    """A copy of a tokenizer, extended for texts with blanks.

    Special tokens that are written out in a text are treated as ordinary text. The token for `BLANK` absorbs adjacent
    spaces in the same way as the tokenizer's own blank token, and the special tokens that the tokenizer adds enclose
    the whole text.

    Args:
        tokenizer: a transformers tokenizer with a `tokenizers` backend; it is not changed.
        kind: the kind of blank; by default the mask token if the tokenizer has one, or else the sentinel, or else the
            position after the text.

    Raises:
        GraftError: GC179 if the tokenizer does not support this kind of blank, or has no `tokenizers` backend.
    """

    def __init__(self, tokenizer: Any, kind: BlankKind | None = None) -> None:
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            hint = "load it with AutoTokenizer, and the package tokenizers"
            raise GraftError("GC179", "the tokenizer does not report the character positions of its tokens", hint=hint)
        self.tokenizer = tokenizer
        self.kind: BlankKind = _kind_of(tokenizer) if kind is None else kind
        self.blank_id = _blank_id(tokenizer, self.kind)
        """The blank token; None if the blank is the position after the text."""
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        blank_token = None if self.blank_id is None else self._backend.get_added_tokens_decoder().get(self.blank_id)
        left, right = (blank_token.lstrip, blank_token.rstrip) if blank_token is not None else (False, False)
        self._backend.add_tokens([AddedToken(BLANK, lstrip=left, rstrip=right, normalized=False, special=False)])
        self._placeholder = self._backend.token_to_id(BLANK)
        self.special_ids = _special_ids(tokenizer)
        """The ids of all special tokens."""
        self.specials = {str(token.content) for token in _added(tokenizer).values() if token.special}
        """The text forms of all special tokens."""

    @property
    def types(self) -> bool:
        """Whether the tokenizer's models take ``token_type_ids``."""
        return "token_type_ids" in self.tokenizer.model_input_names

    @property
    def pad_id(self) -> int:
        """The token used for padding: the tokenizer's padding token, or else its end-of-text token, or else token 0."""
        token = self.tokenizer.pad_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        return 0 if token is None else int(token)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Return an ``Encoding`` for each text, with special tokens; its `offsets` are the tokens' character spans."""
        return list(self._backend.encode_batch([_encodable(text) for text in texts]))

    def ids(self, encoding: Any) -> list[int]:
        """Return an encoding's token ids; if the blank is the position after the text, no special token follows it."""
        ids = [self.blank_id if i == self._placeholder else i for i in encoding.ids]
        if self.kind == "last":
            special = encoding.special_tokens_mask
            while ids and special[len(ids) - 1]:
                ids.pop()
        return [int(i) for i in ids if i is not None]

    def written_specials(self, encoding: Any) -> list[tuple[int, int]]:
        """Return the spans of written-out special tokens that were encoded as special tokens, as happens with T5.

        Args:
            encoding: the encoding of the text.

        Returns:
            The start and end character of each.
        """
        special = self.special_ids - {self.tokenizer.unk_token_id, self._placeholder}
        if special.isdisjoint(encoding.ids):
            return []
        tokens = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        return [offset for i, added, offset in tokens if i in special and not added and offset[1] > offset[0]]

    def word_ids(self, word: str, before: str) -> list[int]:
        """Return the tokens of a word that fills a blank.

        Args:
            word: the word, as written in the verbalizer.
            before: the text before the blank; all that matters is whether it is empty, ends in white space, or neither.
        """
        lead = "" if not before else "a " if before[-1].isspace() else BLANK
        encoding = self._backend.encode(_encodable(lead + word), add_special_tokens=False)
        start = len(lead)
        return [i for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > start]

    def knows(self, ids: Iterable[int]) -> bool:
        """Return whether all of these tokens are ordinary tokens, and none is the unknown token."""
        unknown = self.tokenizer.unk_token_id
        return all(i != unknown and i not in self.special_ids and i != self._placeholder for i in ids)

    def like(self, word: str, before: str) -> list[str]:
        """Return at most three single-token words: first those contained in the given word, then similar ones."""
        start = word[:2].lower()
        vocabulary: dict[str, int] = self._backend.get_vocab()
        plain = {token.lstrip("Ġ▁ ") for token in vocabulary}
        near = [token for token in plain if token.isalpha() and len(token) > 2 and token.lower().startswith(start)]
        similar = difflib.get_close_matches(word, sorted(near), n=_CLOSE, cutoff=0.4)
        one = (other for other in similar if other != word and self._is_one(self.word_ids(other, before)))
        return list(dict.fromkeys([*self._within(word, before, plain), *one]))[:3]

    def _within(self, word: str, before: str, plain: Collection[str]) -> list[str]:
        """Return the single-token words at the start or end of a word's parts, longest first and without overlaps."""
        spans = [
            (first, last)
            for part in re.finditer(r"[^\W\d_]+", word[:_COMPOUND])
            for first in range(part.start(), part.end())
            for last in range(first + _SHORTEST, part.end() + 1)
            if first == part.start() or last == part.end()
        ]
        words: list[str] = []
        taken: list[tuple[int, int]] = []
        for first, last in sorted(spans, key=lambda span: span[0] - span[1]):
            piece = word[first:last]
            piece = piece if piece in plain else piece.lower()
            if piece not in plain or piece == word or any(first < end and last > start for start, end in taken):
                continue
            if self._is_one(self.word_ids(piece, before)):
                words.append(piece)
                taken.append((first, last))
        return words

    def _is_one(self, ids: list[int]) -> bool:
        return len(ids) == 1 and self.knows(ids)

    def pieces(self, ids: Sequence[int]) -> str:
        """Return the tokens in the vocabulary's notation, as one string."""
        return some([quoted(str(token)) for token in self.tokenizer.convert_ids_to_tokens(list(ids))], 8)


def _encodable(text: str) -> str:
    """Return the text with lone surrogates replaced, because tokenizers reject them."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _added(tokenizer: Any) -> Mapping[int, Any]:
    tokens: Mapping[int, Any] = tokenizer.added_tokens_decoder
    return tokens


def _special_ids(tokenizer: Any) -> frozenset[int]:
    more = (number for number, token in _added(tokenizer).items() if token.special)
    return frozenset([*tokenizer.all_special_ids, *more])


def _sentinel(tokenizer: Any) -> int | None:
    token = tokenizer.convert_tokens_to_ids(_SENTINEL)
    return None if token is None or token == tokenizer.unk_token_id else int(token)


def has_sentinel(tokenizer: Any) -> bool:
    """Return whether a tokenizer has T5's sentinel token."""
    return _sentinel(tokenizer) is not None


def _kind_of(tokenizer: Any) -> BlankKind:
    if tokenizer.mask_token_id is not None:
        return "mask"
    return "sentinel" if has_sentinel(tokenizer) else "last"


def _blank_id(tokenizer: Any, kind: BlankKind) -> int | None:
    if kind == "last":
        return None
    token = tokenizer.mask_token_id if kind == "mask" else _sentinel(tokenizer)
    if token is None:
        what = "mask token" if kind == "mask" else f"token {_SENTINEL}"
        raise GraftError("GC179", f"the tokenizer has no {what} for blanks", hint="use the model's own tokenizer")
    return int(token)
