"""Train a classifier, or a regression, on MiniLM with an adaptation, and test it."""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import pearsonr
from torch import Tensor

import graftc
from experiments.encoder import encoder_of
from experiments.loop import LoopTimes, train
from experiments.sources import Batch
from experiments.tasks import HEAD, Task, task_of
from graftc.applications.demo.baseline import embed, logistic_regression
from graftc.applications.demo.data import DataSplit, Encoded, encode, find_model, training_batches
from graftc.applications.demo.training import predict, score
from graftc.specs.errors.diagnostics import GraftError

_CANNOT_FOLD = ("GC022", "GC050")


@dataclass(frozen=True)
class Rated(Encoded):
    """Texts with ratings instead of class indices."""

    def collate(self, rows: Any, labels: bool) -> Batch:
        """Return inputs as for classes; ratings are float32 ``[rows, 1]``."""
        batch = super().collate(rows, labels=False)
        if labels:
            batch["labels"] = torch.tensor([[self.labels[i]] for i in rows], dtype=torch.float32)
        return batch


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell.

    ``test`` and ``validation`` are accuracies or, for a regression, Pearson's correlation.

    Args:
        cell: ``model``, ``rate``, ``seed``, ``steps`` and ``settings``: ``adapt`` and other keys of a spec, the
            ``task``, the number of training ``texts``, the sizes of a ``batch`` (texts, tokens), the ``head_rate``, and
            the ``optimiser``. A spec that is None is the floor: a linear model on frozen embeddings.
    """
    settings, seed = cell["settings"], cell["seed"]
    task = task_of(settings, seed)
    rows, tokens = settings["batch"]
    encoded = _Encoder(cell["model"], tokens, task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if settings["spec"] is None:
            return _floor(cell["model"], task, encoded)
        return _adapted(cell, task, encoded, rows)


class _Encoder:
    """The texts of a task as tokens."""

    def __init__(self, model: str, tokens: int, task: Task) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(find_model())
        self._ids = 50 if model == "tiny-bert" else len(self._tokenizer)
        self._tokens = tokens if model == "minilm" else min(tokens, 12)
        self._kind = Rated if task.is_regression else Encoded
        self.train, self.validation, self.test = map(self._encode, (task.train, task.validation, task.test))

    def _encode(self, split: DataSplit) -> Encoded:
        plain = encode(self._tokenizer, split, self._tokens)
        ids = tuple(tuple(number % self._ids for number in text) for text in plain.ids)
        return self._kind(ids, plain.labels, plain.pad)


def _floor(name: str, task: Task, encoded: _Encoder) -> dict[str, Any]:
    """Return the figures of logistic or, for ratings, ridge regression on frozen sentence embeddings."""
    model: Any = encoder_of(name, task.outputs, 0)
    known, *others = (embed(model.bert, split) for split in (encoded.train, encoded.validation, encoded.test))
    figures: dict[str, Any] = {"trained": (known.shape[1] + 1) * task.outputs}
    for key, features, split in zip(("validation", "test"), others, (task.validation, task.test), strict=True):
        if task.is_regression:
            from sklearn.linear_model import Ridge

            fitted = Ridge().fit(known.numpy(), task.train.labels)
            figures[key] = float(pearsonr(fitted.predict(features.numpy()), split.labels).statistic)
        else:
            scores = logistic_regression(known, task.train.labels, features, split.labels, task.outputs)
            figures[key] = scores.accuracy
            figures["macro_f1"] = scores.macro_f1  # of the last, the test texts
    return figures


def _adapted(cell: Mapping[str, Any], task: Task, encoded: _Encoder, rows: int) -> dict[str, Any]:
    settings, seed, times = cell["settings"], cell["seed"], LoopTimes()
    base = encoder_of(cell["model"], task.outputs, seed)
    losses = list[float]()
    batches = training_batches(encoded.train, rows, seed)
    started = time.perf_counter()

    def run(compiled: Any, stage: Any) -> None:
        if stage.number == 1:
            times.record("compile_s", started)
        overrides = {"trained": {"lr": settings["head_rate"]}} if "train" in settings["spec"] else {}
        steps = cell["steps"] // stage.total
        losses.extend(train(compiled, batches, steps, cell["rate"], settings["optimiser"], overrides, times))

    starts = range(0, min(4 * rows, len(encoded.train) - rows + 1), rows)
    examples = [encoded.train.collate(range(start, start + rows), labels=True) for start in starts]
    compiled: Any = graftc.tune(settings["spec"], base, run, examples=examples, seed=seed)
    head = sum(p.numel() for p in base.get_submodule(HEAD).parameters())
    started = time.perf_counter()
    logits = _logits(compiled, encoded.test)
    times.record("test_s", started)
    chosen_by = _logits(compiled, encoded.validation)
    with tempfile.TemporaryDirectory() as folder:
        compiled.save(Path(folder) / "saved")
        size = sum(path.stat().st_size for path in Path(folder, "saved").glob("**/*.safetensors"))
    return {
        "trained": sum(p.numel() for p in compiled.parameters() if p.requires_grad) - head,
        "bytes": size,
        "loss": statistics.fmean(losses[-10:]),
        "test": _quality(logits, task, task.test),
        **_macro_f1(logits, task),
        "validation": _quality(chosen_by, task, task.validation),
        "validation_loss": _loss(chosen_by, task, task.validation),
        **_folded(compiled, encoded.test.collate(range(64), labels=False), times),
        "times": times.values,
    }


def _logits(model: Any, data: Encoded) -> Tensor:
    return predict(lambda batch: model(**batch).logits, data)


def _quality(logits: Tensor, task: Task, split: DataSplit) -> float:
    """Return the accuracy of logits or, for ratings, Pearson's correlation; 0 where all outputs are the same."""
    if not bool(logits.isfinite().all()):
        return 0.0
    if task.is_regression:
        outputs = logits[:, 0].double()
        return float(pearsonr(outputs.numpy(), split.labels).statistic) if bool(outputs.std() > 0) else 0.0
    return score(logits.argmax(-1).tolist(), list(split.labels), task.outputs).accuracy


def _macro_f1(logits: Tensor, task: Task) -> dict[str, float]:
    """Return the macro-F1 over the classes on the test texts; nothing for ratings."""
    if task.is_regression or not bool(logits.isfinite().all()):
        return {}
    return {"macro_f1": score(logits.argmax(-1).tolist(), list(task.test.labels), task.outputs).macro_f1}


def _loss(logits: Tensor, task: Task, split: DataSplit) -> float:
    """Return the cross-entropy or, for ratings, the mean squared error."""
    if task.is_regression:
        return float(torch.nn.functional.mse_loss(logits[:, 0], torch.tensor(split.labels)))
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(split.labels)))


def _folded(compiled: Any, batch: Batch, times: LoopTimes) -> dict[str, Any]:
    """Return how far the folded model's logits are from the unfolded one's, over the largest; None if nothing folds."""
    started = time.perf_counter()
    try:
        merged = compiled.merge()
    except GraftError as error:
        if error.code not in _CANNOT_FOLD:
            raise
        return {"folded": None}
    times.record("fold_s", started)
    with torch.no_grad():
        folded, logits = (model(**batch).logits for model in (merged, compiled))
    apart = (folded - logits).abs().max() / logits.abs().max()
    return {"folded": float(apart), "retention": merged.certificate.retention.norm}
