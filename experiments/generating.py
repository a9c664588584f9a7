"""Train SmolLM2 to say records in sentences, and test what it writes, on categories of training and on others."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sacrebleu
import torch
from torch import Tensor

import graftc
from experiments.grammar import REFERENCES, Example, examples
from experiments.loop import LoopTimes, train
from experiments.sources import Batch, base_of
from graftc.applications.demo.data import padded
from graftc.applications.demo.decoder import find_decoder

PROMPT = "{record}\nIn words:"
_IGNORED = -100
_SEEDS: Mapping[str, int] = {"validation": 101, "seen": 102, "unseen": 103}
"""Seeds of the examples that are the same in every cell."""


@dataclass(frozen=True)
class Encoded:
    """Examples as tokens.

    Attributes:
        prompts: the tokens of each record.
        targets: the tokens of each target, with the one that ends it.
    """

    prompts: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    pad: int

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return inputs padded on the right, with labels for the tokens of targets."""
        texts = [(*self.prompts[i], *self.targets[i]) for i in rows]
        ids, mask = padded(texts, self.pad)
        labels = ids.masked_fill(mask == 0, _IGNORED)
        for row, i in enumerate(rows):
            labels[row, : len(self.prompts[i])] = _IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """Yield shuffled batches without end."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.prompts), generator=draw).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield self.batch(order[start : start + size])


class _Words:
    """The tokenizer; for a tiny model its ids are folded into a small vocabulary."""

    def __init__(self, model: str) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(find_decoder())
        self._ids = 50 if model.startswith("tiny-") else len(self._tokenizer)
        self.end = int(self._tokenizer.eos_token_id) % self._ids

    def encode(self, some: Sequence[Example]) -> Encoded:
        """Return records as prompts and first sentences as targets."""
        prompts = tuple(self._tokens(PROMPT.format(record=own.record)) for own in some)
        targets = tuple((*self._tokens(f" {own.sentences[0]}"), self.end) for own in some)
        return Encoded(prompts, targets, self.end)

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(number % self._ids for number in self._tokenizer(text)["input_ids"])

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text up to the token that ends it."""
        before = tokens[: tokens.index(self.end)] if self.end in tokens else tokens
        return str(self._tokenizer.decode(before, skip_special_tokens=True)).strip()


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell: losses of a token of targets, BLEU and chrF, for both groups of categories.

    Args:
        cell: ``model``, ``rate``, ``seed``, ``steps`` and ``settings``: the ``spec`` (None for the model as it is), the
            number of ``records`` to train on and to ``test`` with, the rows of a ``batch``, the ``optimiser``, and the
            number of ``new_tokens``.
    """
    settings, seed = cell["settings"], cell["seed"]
    words = _Words(cell["model"])
    base = base_of(cell["model"], getattr(torch, cell["dtype"]), seed).eval()
    validation = examples(settings["test"], _SEEDS["validation"])
    tests = {name: _test(settings["test"], name) for name in ("seen", "unseen")}
    reserved = {own.record for some in (validation, *tests.values()) for own in some}
    data = words.encode(examples(settings["records"], seed, without=reserved))
    times, losses = LoopTimes(), list[float]()
    model, trained = base, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if settings["spec"] is not None:

            def run(compiled: Any, stage: Any) -> None:
                optimiser = settings["optimiser"]
                batches = data.batches(settings["batch"], seed)
                losses.extend(train(compiled, batches, cell["steps"], cell["rate"], optimiser, {}, times))

            model = graftc.tune(settings["spec"], base, run, seed=seed)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        tested = {name: _tested(model, words, some, settings["new_tokens"]) for name, some in tests.items()}
        return {
            "trained": trained,
            "loss": statistics.fmean(losses[-10:]) if losses else None,
            "validation": -_loss(model, words.encode(validation)),
            **{f"{key}_{name}": value for name, own in tested.items() for key, value in own.items()},
            "times": times.values,
        }


def _loss(model: Any, data: Encoded) -> float:
    """Return the mean loss of a token of targets."""
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(data.prompts), 8):
            batch = data.batch(range(start, min(start + 8, len(data.prompts))))
            tokens = int((batch["labels"][:, 1:] != _IGNORED).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    return total / count


def _test(count: int, name: str) -> tuple[Example, ...]:
    """Return examples of categories that are seen or unseen in training, which no cell trains on."""
    return examples(count, _SEEDS[name], held_out=name == "unseen", references=REFERENCES)


def _tested(model: Any, words: _Words, some: Sequence[Example], new_tokens: int) -> dict[str, float]:
    data = words.encode(some)
    written = [words.text(tokens) for tokens in _written(model, data, new_tokens)]
    references = [[own.sentences[k] for own in some] for k in range(REFERENCES)]
    return {
        "loss": _loss(model, data),
        "bleu": sacrebleu.corpus_bleu(written, references).score,
        "chrf": sacrebleu.corpus_chrf(written, references).score,
        "exact": statistics.fmean(text in own.sentences for text, own in zip(written, some, strict=True)),
    }


def _written(model: Any, data: Encoded, count: int, size: int = 20) -> Iterator[list[int]]:
    """Yield the tokens that a model writes behind each prompt, the most likely one at each step."""
    for start in range(0, len(data.prompts), size):
        ids, mask = padded(data.prompts[start : start + size], data.pad, left=True)
        with torch.no_grad():
            out: Tensor = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=count,
                do_sample=False,
                eos_token_id=data.pad,
                pad_token_id=data.pad,
            )
        yield from out[:, ids.shape[1] :].tolist()
