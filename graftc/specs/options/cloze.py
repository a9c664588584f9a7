"""Options of a spec that make a language model classify by filling blanks."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from graftc.specs.base import Items, SpecModel
from graftc.specs.errors.text import quoted
from graftc.specs.limits import LABELS, PATTERN_TOKENS, VERBALIZERS, WORDS
from graftc.specs.spec_errors import first_repeat, refuse

Label: TypeAlias = Annotated[str, Field(min_length=1)]
TokenId: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)]
Word: TypeAlias = Annotated[Items[TokenId], Field(min_length=1, max_length=PATTERN_TOKENS)]
Words: TypeAlias = Annotated[Items[Word], Field(min_length=1, max_length=WORDS)]
Verbalizer: TypeAlias = Annotated[Items[Words], Field(min_length=2, max_length=LABELS)]


class ClozeOptions(SpecModel):
    """A language model classifies by filling blanks: inputs are texts with blanks in them, and the logit of a label is
    the mean over its words of the sum over the blanks of the model's logits of the word's tokens there (Schick and
    Schütze 2021, Exploiting Cloze Questions for Few Shot Text Classification and Natural Language Inference).

    `graftc pet` writes these options from patterns and words.
    """

    blank: TokenId | Literal["last"] | None = None
    """Id of the token that stands for a blank, the mask token of a masked language model; or `last`: the blank is what
    comes after the text, for decoders."""

    decoder: Annotated[Items[TokenId], Field(max_length=PATTERN_TOKENS)] = ()
    """For encoder-decoder models that mark blanks with sentinels, instead of `blank`: what the decoder is given; the
    blank is what comes next. For T5 its start token and the first sentinel."""

    labels: Annotated[Items[Label], Field(min_length=2, max_length=LABELS, json_schema_extra={"uniqueItems": True})]
    """The labels in the order of the logits."""

    verbalizers: Annotated[Items[Verbalizer], Field(min_length=1, max_length=VERBALIZERS)]
    """For each pattern, usually one, the words of each label, in the order of the labels. A word is a list of token
    ids, one for each blank. With several verbalizers, calls say which one every row has by the input `pattern`, whole
    numbers of shape `[batch]`."""

    @property
    def blanks(self) -> int:
        """The largest number of blanks in any pattern."""
        return max(len(verbalizer[0][0]) for verbalizer in self.verbalizers)

    @classmethod
    def _conditions(cls) -> list[dict[str, Any]]:
        """Require either `blank` or `decoder`."""
        has_blank = {"properties": {"blank": {"not": {"type": "null"}}}, "required": ["blank"]}
        return [
            {
                "if": has_blank,
                "then": {"properties": {"decoder": {"maxItems": 0}}},
                "else": {"properties": {"decoder": {"minItems": 1}}, "required": ["decoder"]},
            }
        ]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.blank is None) == (not self.decoder):
            both = "both blank and decoder define the blank"
            message = both if self.decoder else "neither blank nor decoder defines the blank"
            refuse("blank", message, hint="set blank, or decoder for models like T5")
        if (number := first_repeat(self.labels)) is not None:
            refuse(("labels", number), f"the label {quoted(self.labels[number])} is listed twice", hint="remove it")
        for index, verbalizer in enumerate(self.verbalizers):
            self._check_verbalizer(verbalizer, ("verbalizers", index))
        return self

    def _check_verbalizer(self, verbalizer: Verbalizer, path: tuple[str | int, ...]) -> None:
        if len(verbalizer) != len(self.labels):
            message = f"words for {len(verbalizer)} labels, but there are {len(self.labels)}"
            refuse(path, message, hint=f"in this order: {', '.join(self.labels)}")
        blanks = len(verbalizer[0][0])
        first: dict[tuple[tuple[int, ...], ...], str] = {}
        for index, (label, words) in enumerate(zip(self.labels, verbalizer, strict=True)):
            for number, word in enumerate(words):
                if len(word) != blanks:
                    message = f"a word has {len(word)} tokens, but the first word of this verbalizer has {blanks}"
                    refuse((*path, index, number), message, hint="a word has a token for each blank")
                if blanks > 1 and (self.decoder or self.blank == "last"):
                    message = f"a word has {blanks} tokens, but only one token is predicted after a text"
                    refuse((*path, index, number), message, hint="choose words of one token")
            other = first.setdefault(tuple(sorted(map(tuple, words))), label)
            if other != label:
                message = f"the labels {quoted(other)} and {quoted(label)} have the same words"
                refuse((*path, index), message, hint="nothing would tell them apart")
