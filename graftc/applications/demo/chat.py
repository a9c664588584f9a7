"""News topics as a conversation: the user shows a text and asks for its topic, the assistant answers with one word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graftc.applications.demo.data import Dataset, DataSplit, padded

if TYPE_CHECKING:
    import torch


TEXT_TOKENS = 48
"""Texts are cut after this many tokens."""

TOPICS = {
    "acq": "deal",
    "crude": "oil",
    "earn": "profit",
    "grain": "grain",
    "interest": "interest",
    "money-fx": "money",
    "ship": "ship",
    "trade": "trade",
}
"""The word that names each Reuters R8 topic in answers: an English word that the model's tokenizer encodes as a single
token, so that a topic's probability is the probability of one token."""


@dataclass(frozen=True)
class Chats:
    """Conversations as token ids: the user's turn, and the assistant's answer up to the end of its turn.

    Attributes:
        prompts: the prompts, up to the point where the assistant begins to speak, unpadded.
        answers: for each conversation, the topic's name and the token that ends the turn.
        labels: the index of each conversation's topic.
        pad: the padding token.
        texts: the texts that the questions are about, after truncation.
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad: int
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> Chats:
        """Return the first ``count`` conversations."""
        return Chats(self.prompts[:count], self.answers[:count], self.labels[:count], self.pad, self.texts[:count])

    @property
    def ids(self) -> tuple[tuple[int, ...], ...]:
        """The token ids by whose lengths conversations are batched."""
        return self.prompts

    def collate(self, rows: Sequence[int], labels: bool) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``, padded on the left.

        With ``labels``, each prompt is followed by its answer. Logits are then limited to the last positions
        (``logits_to_keep``): the tokens of the longest answer and one position before them. Among these positions, the
        labels are -100 outside the answers. The head, a fifth of the model, thus computes only the logits that the loss
        uses.
        """
        import torch

        prompts = [self.prompts[i] for i in rows]
        if not labels:
            ids, mask = padded(prompts, self.pad, left=True)
            return {"input_ids": ids, "attention_mask": mask}
        answers = [self.answers[i] for i in rows]
        ids, mask = padded([p + a for p, a in zip(prompts, answers, strict=True)], self.pad, left=True)
        kept = max(map(len, answers)) + 1
        wanted = torch.full((len(rows), kept), -100, dtype=torch.int64)
        for k, answer in enumerate(answers):
            wanted[k, kept - len(answer) :] = torch.tensor(answer, dtype=torch.int64)
        # A tensor, since a plain integer would become a constant of the graph and fix the length of texts.
        positions = torch.arange(-kept, 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": wanted, "logits_to_keep": positions}


@dataclass(frozen=True)
class Topics:
    """A classification task in the form of conversations with a model.

    Attributes:
        tokenizer: a transformers tokenizer with a chat template.
        names: the names of the classes, as used in answers.
        tokens: the single token that encodes each name.
    """

    tokenizer: Any
    names: tuple[str, ...]
    tokens: tuple[int, ...]

    def question(self, text: str) -> str:
        """Return the user's turn, which shows a text and asks for its topic."""
        *some, last = self.names
        return f"{text}\n\nWhat is the topic of this text? Answer with one word: {', '.join(some)} or {last}."

    def chats(self, split: DataSplit) -> Chats:
        """Return a conversation about each text.

        Raises:
            ValueError: if the chat template does not append the answer to the prompt, or does not end the answer.
        """
        rows = [self._chat(text, label) for text, label in zip(split.texts, split.labels, strict=True)]
        prompts, answers, texts = zip(*rows, strict=True)
        return Chats(prompts, answers, split.labels, int(self.tokenizer.pad_token_id), texts)

    def _chat(self, text: str, label: int) -> tuple[tuple[int, ...], tuple[int, ...], str]:
        read = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(read) > TEXT_TOKENS:
            text = self.tokenizer.decode(read[:TEXT_TOKENS])
        turns = [{"role": "user", "content": self.question(text)}]
        prompt = self._ids(turns, add_generation_prompt=True)
        conversation = self._ids([*turns, {"role": "assistant", "content": self.names[label]}])
        answer, end = conversation[len(prompt) :], self.tokenizer.eos_token_id
        if conversation[: len(prompt)] != prompt or answer[:1] != (self.tokens[label],) or end not in answer:
            raise ValueError(
                f"the chat template does not append the answer to the prompt: {self.tokenizer.decode(conversation)!r}"
            )
        return prompt, answer[: answer.index(end) + 1], text

    def _ids(self, turns: list[dict[str, str]], **options: bool) -> tuple[int, ...]:
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, **options)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def named_in(self, answer: str) -> int | None:
        """Return the first topic that a written answer names, ignoring case; None if it names no topic."""
        match = re.search(rf"\b({'|'.join(map(re.escape, self.names))})\b", answer, re.IGNORECASE)
        return None if match is None else self.names.index(match[0].lower())


def topics_of(data: Dataset, tokenizer: Any) -> Topics:
    """Return the task for a data set with the classes in `TOPICS`.

    Raises:
        ValueError: if the tokenizer has no chat template, or does not encode each name as a single token.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    names = tuple(TOPICS[name] for name in data.names)
    tokens = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
    split = [name for name, ids in zip(names, tokens, strict=True) if len(ids) != 1]
    if split:
        raise ValueError(f"these names are not single tokens: {', '.join(split)}")
    return Topics(tokenizer, names, tuple(ids[0] for ids in tokens))
