"""Train and score the models of probes, whose figures show what a method does to a model, not only how good it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import graftc
from experiments.loop import LoopTimes, train
from experiments.sources import Batch
from experiments.tasks import Task
from graftc.applications.demo.data import DataSplit, Encoded, encode, find_model, training_batches
from graftc.applications.demo.training import predict, score

Look = Callable[[Any], None]
"""A function that is called with the compiled model several times during training, and changes nothing."""


def encoded_texts(cell: Mapping[str, Any], task: Task) -> tuple[Encoded, Encoded, Encoded]:
    """Return the training, validation and test texts of a task as tokens."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(find_model())
    is_tiny = cell["model"].startswith("tiny-")
    ids, tokens = (50, 12) if is_tiny else (len(tokenizer), cell["settings"]["batch"][1])

    def encoded(split: DataSplit) -> Encoded:
        plain = encode(tokenizer, split, tokens)
        return Encoded(tuple(tuple(number % ids for number in text) for text in plain.ids), plain.labels, plain.pad)

    return encoded(task.train), encoded(task.validation), encoded(task.test)


def fitted(cell: Mapping[str, Any], base: Any, data: Encoded, look: Look | None = None, looks: int = 4) -> Any:
    """Return a compiled model that has been trained as a cell says, for all its steps in each stage of a method.

    Args:
        cell: ``rate``, ``seed``, ``steps`` and ``settings``: the ``spec``, the ``head_rate``, the ``optimiser`` and the
            sizes of a ``batch``.
        base: the model.
        data: the texts to train on.
        look: a function that sees the model ``looks`` times, evenly spread over the steps, the last time at the end.
        looks: how often.
    """
    settings = cell["settings"]
    rows = settings["batch"][0]
    batches = training_batches(data, rows, cell["seed"])

    def run(compiled: Any, stage: Any) -> None:
        steps = cell["steps"]
        seen = batches if look is None else _watched(batches, steps, looks, lambda: look(compiled))
        overrides = {"trained": {"lr": settings["head_rate"]}} if "train" in settings["spec"] else {}
        train(compiled, seen, steps, cell["rate"], settings["optimiser"], overrides, LoopTimes())

    starts = range(0, min(4 * rows, len(data) - rows + 1), rows)
    examples = [data.collate(range(start, start + rows), labels=True) for start in starts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = graftc.tune(settings["spec"], base, run, examples=examples, seed=cell["seed"])
    if look is not None:
        look(compiled)
    return compiled


def _watched(batches: Iterator[Batch], steps: int, looks: int, look: Callable[[], None]) -> Iterator[Batch]:
    """Yield batches; look after each of the first ``looks - 1`` of ``looks`` equal parts of the steps."""
    moments = {steps * part // looks for part in range(1, looks)} - {0}
    for step in range(steps):
        if step in moments:
            look()
        yield next(batches)


def scores(model: Any, data: Encoded, outputs: int) -> tuple[float, float]:
    """Return the accuracy and the cross-entropy of a model's logits."""
    logits: Tensor = predict(lambda batch: model(**batch).logits, data)
    accuracy = score(logits.argmax(-1).tolist(), list(data.labels), outputs).accuracy
    return accuracy, float(torch.nn.functional.cross_entropy(logits, torch.tensor(data.labels)))


def chosen_by(model: Any, validation: Encoded, outputs: int) -> dict[str, float]:
    """Return the figures that a sweep chooses a rate by, as `experiments.training_plans.quality` reads them."""
    accuracy, loss = scores(model, validation, outputs)
    return {"validation": accuracy, "validation_loss": loss}
