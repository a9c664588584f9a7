"""A tokenizer that supports blanks: a placeholder in a text becomes the blank's token, and nothing else is special."""

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
"""What a blank is: the mask token; the position after the text, in models that write from left to right; or T5's
sentinel, after which the decoder writes."""

_SENTINEL = "<extra_id_0>"
_CLOSE = 8
"""The most tokens similar to a word that are tried."""

_COMPOUND, _SHORTEST = 100, 3
"""The most characters of a word that are searched for shorter words, and the fewest characters of such a word."""


class BlankTokenizer:
    """A copy of a tokenizer for texts with blanks.

    Special tokens that are written out in a text are treated as text. The token that `BLANK` represents takes the
    spaces beside it as the tokenizer's own does, and the tokenizer puts its special tokens around the whole text.

    Args:
        tokenizer: a tokenizer of transformers with a backend of the `tokenizers` library; it is not changed.
        kind: what a blank is. By default, what the tokenizer has: a mask token, a sentinel, or neither.

    Raises:
        GraftError: GC179 if the tokenizer has no such blank, or belongs to another library.
    """

    def __init__(self, tokenizer: Any, kind: BlankKind | None = None) -> None:
        from tokenizers import AddedToken, Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            hint = "load it with AutoTokenizer, and the package tokenizers"
            raise GraftError("GC179", "the tokenizer does not tell which characters its tokens are of", hint=hint)
        self.tokenizer = tokenizer
        self.kind: BlankKind = _kind_of(tokenizer) if kind is None else kind
        self.blank_id = _blank_id(tokenizer, self.kind)
        """The token of a blank; None where it is what comes after the text."""
        self._backend = Tokenizer.from_str(backend.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True
        blank_token = None if self.blank_id is None else self._backend.get_added_tokens_decoder().get(self.blank_id)
        left, right = (blank_token.lstrip, blank_token.rstrip) if blank_token is not None else (False, False)
        self._backend.add_tokens([AddedToken(BLANK, lstrip=left, rstrip=right, normalized=False, special=False)])
        self._placeholder = self._backend.token_to_id(BLANK)
        self.special_ids = _special_ids(tokenizer)
        """Every token that is not part of a text."""
        self.specials = {str(token.content) for token in _added(tokenizer).values() if token.special}
        """How special tokens are written."""

    @property
    def types(self) -> bool:
        """Whether the tokenizer's models take token types."""
        return "token_type_ids" in self.tokenizer.model_input_names

    @property
    def pad_id(self) -> int:
        """The token that fills batches: the tokenizer's padding, or else the end of a text, or else token 0."""
        token = self.tokenizer.pad_token_id
        token = self.tokenizer.eos_token_id if token is None else token
        return 0 if token is None else int(token)

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """Return an ``Encoding`` for each text, with special tokens; `offsets` gives the characters of each token."""
        return list(self._backend.encode_batch([_encodable(text) for text in texts]))

    def ids(self, encoding: Any) -> list[int]:
        """Return the tokens of an encoding; if the blank comes after the text, nothing else does."""
        ids = [self.blank_id if i == self._placeholder else i for i in encoding.ids]
        if self.kind == "last":
            special = encoding.special_tokens_mask
            while ids and special[len(ids) - 1]:
                ids.pop()
        return [int(i) for i in ids if i is not None]

    def written_specials(self, encoding: Any) -> list[tuple[int, int]]:
        """Return where a text writes a special token that the vocabulary reads as such, as T5's does.

        Args:
            encoding: the encoding of the text.

        Returns:
            The first character and the end of each.
        """
        special = self.special_ids - {self.tokenizer.unk_token_id, self._placeholder}
        if special.isdisjoint(encoding.ids):
            return []
        tokens = zip(encoding.ids, encoding.special_tokens_mask, encoding.offsets, strict=True)
        return [offset for i, added, offset in tokens if i in special and not added and offset[1] > offset[0]]

    def word_ids(self, word: str, before: str) -> list[int]:
        """Return the tokens of a word in a blank.

        Args:
            word: the word, as written in the verbalizer.
            before: what comes before the blank: nothing, white space, or anything else.
        """
        lead = "" if not before else "a " if before[-1].isspace() else BLANK
        encoding = self._backend.encode(_encodable(lead + word), add_special_tokens=False)
        start = len(lead)
        return [i for i, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if end > start]

    def knows(self, ids: Iterable[int]) -> bool:
        """Return whether all of these are ordinary tokens of the vocabulary, and none represents unknown text."""
        unknown = self.tokenizer.unk_token_id
        return all(i != unknown and i not in self.special_ids and i != self._placeholder for i in ids)

    def like(self, word: str, before: str) -> list[str]:
        """Return at most three words of one token each: those that a word contains, then those that look similar."""
        start = word[:2].lower()
        vocabulary: dict[str, int] = self._backend.get_vocab()
        plain = {token.lstrip("Ġ▁ ") for token in vocabulary}
        near = [token for token in plain if token.isalpha() and len(token) > 2 and token.lower().startswith(start)]
        similar = difflib.get_close_matches(word, sorted(near), n=_CLOSE, cutoff=0.4)
        one = (other for other in similar if other != word and self._is_one(self.word_ids(other, before)))
        return list(dict.fromkeys([*self._within(word, before, plain), *one]))[:3]

    def _within(self, word: str, before: str, plain: Collection[str]) -> list[str]:
        """Return the words of one token at the ends of a word's parts, the longest first and without overlaps."""
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
        """Return the tokens as the vocabulary writes them, in one string."""
        return some([quoted(str(token)) for token in self.tokenizer.convert_ids_to_tokens(list(ids))], 8)


def _encodable(text: str) -> str:
    """Return the text with lone surrogates replaced, which tokenizers do not read."""
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
    """Return whether a tokenizer has T5's sentinel."""
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
        raise GraftError("GC179", f"the tokenizer has no {what} for blanks", hint="name the model's own tokenizer")
    return int(token)
