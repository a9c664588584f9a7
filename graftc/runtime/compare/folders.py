"""Compare two model folders tensor by tensor, reading from disk: the differences, and their likely causes.

Tensors are read in blocks of rows, several times, so that memory use does not grow with the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.headers import StoredTensor
from graftc.files.tensors.weights import INDEX, SINGLE
from graftc.records.comparison import Cause, Difference, WeightChange, WeightsDiff
from graftc.runtime.compare.difference import Matrices, difference
from graftc.specs.errors.text import format_layers

COMPARED = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2")
"""The dtypes that are compared numerically; tensors of other dtypes are only checked for equal bytes."""


_LAYER = re.compile(r"(\.|^)\d+(\.)")


def alike(comparison: WeightsDiff) -> list[tuple[str, list[WeightChange]]]:
    """Return the differing tensors, grouped so that layers that differ in the same way are together.

    Each group has one name that includes its layers, such as ``h.{0-3}.attn.q``.
    """
    groups: dict[tuple[Any, ...], list[WeightChange]] = {}
    for item in comparison.tensors:
        change = item.difference
        key = (_LAYER.sub(r"\1*\2", item.name, count=1), item.status, item.base, item.other)
        groups.setdefault((*key, change and change.cause), []).append(item)
    return [(_named([item.name for item in items]), items) for items in groups.values()]


def _named(names: list[str]) -> str:
    """Return one name for several tensors whose names differ only in the layer number."""
    layers = [int(match.group().strip(".")) for name in names if (match := _LAYER.search(name))]
    if len(names) == 1 or len(layers) < len(names):
        return names[0]
    return _LAYER.sub(lambda match: f"{match[1]}{{{format_layers(layers)}}}{match[2]}", names[0], count=1)


def is_model_folder(path: Path) -> bool:
    """Return whether a folder contains weights in transformers' file layout."""
    return any((path / name).is_file() for name in (SINGLE, INDEX))


def compare_folders(a: Path, b: Path, advance: Callable[[float], None] = lambda _: None) -> WeightsDiff:
    """Compare the weights in the second folder with those in the first.

    Args:
        a: the first folder, with ``model.safetensors``, or with an index and the files that it names.
        b: the second folder, with the same kinds of files.
        advance: a function that is called with the fraction that has been compared, from 0 to 1.

    Raises:
        GraftError: GC100 if files are missing or damaged, GC101 if names lead out of a folder.
    """
    first, second = TensorFolder(a), TensorFolder(b)
    mine, theirs = first.entries, second.entries
    total = max(1, sum(math.prod(stored.shape) for stored in mine.values()))
    differences: list[WeightChange] = []
    done = equal = 0
    with first, second, torch.no_grad():
        for name, stored in mine.items():
            item = _compared(name, stored, theirs.get(name), (first, second))
            equal += item is None
            differences += [] if item is None else [item]
            done += math.prod(stored.shape)
            advance(done / total)
    differences += [WeightChange(name, "added", "", str(stored)) for name, stored in theirs.items() if name not in mine]
    return WeightsDiff(equal, tuple(sorted(differences, key=_by_name)))


def _by_name(item: WeightChange) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item.name.split(".")]


def _rows(tensor: Tensor) -> Callable[[int, int], Tensor]:
    """Return a function that reads rows of a tensor, viewed as a matrix."""
    if tensor.dim() < 2:
        tensor = tensor.reshape(1, -1)
    return lambda start, end: tensor[start:end].flatten(1)


def _compared(
    name: str, stored: StoredTensor, other: StoredTensor | None, folders: Iterable[TensorFolder]
) -> WeightChange | None:
    """Return how a tensor differs; None if it does not differ."""
    if other is None:
        return WeightChange(name, "removed", str(stored), "")
    if stored.shape != other.shape:
        return WeightChange(name, "reshaped", str(stored), str(other))
    if 0 in stored.shape:
        return None if stored.dtype == other.dtype else WeightChange(name, "retyped", str(stored), str(other))
    rows = stored.shape[0] if len(stored.shape) > 1 else 1
    (a, b), shape = (_rows(folder[name]) for folder in folders), stored.shape
    pair = Matrices(a, b, (rows, math.prod(shape) // rows))
    if stored.dtype not in COMPARED or other.dtype not in COMPARED:
        same = stored.dtype == other.dtype and all(torch.equal(mine, theirs) for _, mine, theirs in pair.blocks())
        return None if same else WeightChange(name, "changed", str(stored), str(other))
    if pair.equal():
        return None if stored.dtype == other.dtype else WeightChange(name, "retyped", str(stored), str(other))
    return WeightChange(name, "changed", str(stored), str(other), difference(pair, matrix=len(shape) == 2))


def summary(comparison: WeightsDiff) -> list[str]:
    """Return a line for each likely cause of the differences, starting with the cause that affects the most tensors."""
    counts: dict[Cause, list[Difference]] = {}
    for item in comparison.tensors:
        if item.difference is not None:
            counts.setdefault(item.difference.cause, []).append(item.difference)
    order = sorted(counts.items(), key=lambda pair: -len(pair[1]))
    return [f"{len(items)} by {_MAKERS[cause].format(_ranks(items))}" for cause, items in order]


_MAKERS: Mapping[Cause, str] = {
    "low rank": "a low-rank update{}, such as LoRA's",
    "row scaling": "a vector on outputs, such as IA3's",
    "column scaling": "a vector on inputs, such as IA3's on feed-forwards",
    "rows": "training some rows, such as those of tokens",
    "entries": "training some entries",
    "vector": "training a bias, a norm or another tensor that is not a matrix",
    "full": "full fine-tuning, or a high-rank update, such as DoRA's",
    "rounding": "no more than rounding",
}


def _ranks(items: Iterable[Difference]) -> str:
    ranks = sorted({item.rank for item in items if item.rank})
    if not ranks:
        return ""
    return f" of rank {ranks[0]}" if len(ranks) == 1 else f" of rank {ranks[0]} to {ranks[-1]}"


def lines(comparison: WeightsDiff) -> Iterator[str]:
    """Yield one line, beginning with a sign, for each tensor or group of layers that differ in the same way."""
    signs = {"added": "+", "removed": "-"}
    text = {"added": "added", "removed": "removed", "retyped": "the same values", "reshaped": "different sizes"}
    for name, items in alike(comparison):
        first = items[0]
        count = f" ({len(items)} tensors)" if len(items) > 1 else ""
        types = " -> ".join(dict.fromkeys(filter(None, (first.base, first.other))))
        measured = [item.difference for item in items if item.difference is not None]
        how = _numbers(measured) if measured else text.get(first.status, "differs")
        yield f"{signs.get(first.status, '~')} {name}{count} {types}: {how}"


def _numbers(differences: list[Difference]) -> str:
    cause = differences[0].cause
    parts = [_ranks(differences).removeprefix(" of ") or cause]
    explained = min((each.explained for each in differences if each.explained is not None), default=None)
    if explained is not None and cause != "rounding":
        parts.append(f"which is {100 * explained:.1f} % of it")
    if cause == "rows":
        parts.append(f"at most {max(each.rows or 0 for each in differences)}")
    norms = dict.fromkeys(
        f"{norm:.1e}" for norm in (min(d.norm for d in differences), max(d.norm for d in differences))
    )
    return ", ".join(
        [*parts, f"norm {' to '.join(norms)} of the base's", f"largest {max(d.largest for d in differences):.2g}"]
    )
