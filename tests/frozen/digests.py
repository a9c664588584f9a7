"""Digests of tensors and of evidence, a part of which can be compared on any processor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 3e-4
"""How far the magnitudes of the same numbers may be apart, relatively, where two processors computed them.
Rounding a base to eight bits moves outputs by up to 2e-4."""


def digest(text: str) -> str:
    """Return a digest of a text, as 16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], *facts: object) -> str:
    """Return three words about tensors: a digest of names, dtypes and shapes, a magnitude, and a digest of the bytes.

    The order of the tensors does not matter. The magnitude is a sum over the tensors of ``log2(1 + 1000 m)``, where
    ``m`` is the mean of the finite absolute values, later ones weighted up to twice as much. It hardly depends on
    rounding, but on which numbers were drawn, on the order of rows, and on every tensor, however large the others are.

    Args:
        tensors: the tensors by name.
        facts: further values that the first word depends on and that do not depend on the processor.
    """
    structure, content, magnitude = [str(fact) for fact in facts], hashlib.sha256(), 0.0
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        own = tensor.detach().contiguous().reshape(-1)
        structure.append(f"{name}:{tensor.dtype}:{list(tensor.shape)}")
        content.update(name.encode() + own.view(torch.uint8).numpy().tobytes())
        magnitude += math.log2(1 + 1000 * _mean(own))
    return _three(structure, magnitude, content.hexdigest())


def _mean(values: Tensor) -> float:
    sizes = values.double().abs().nan_to_num(0, 0, 0)
    return float((sizes * torch.linspace(1, 2, len(sizes), dtype=torch.float64)).sum()) / max(1, len(sizes))


def evidence_digest(evidence: Any) -> str:
    """Return three words about JSON data, like those of `tensors_digest`.

    The first depends on everything except numbers, the second is a sum over the numbers, and the third depends on all.
    """
    numbers = list(_numbers(evidence))
    magnitude = sum(math.log2(1 + 1000 * abs(number)) for number in numbers if math.isfinite(number))
    structure = json.dumps(_without_numbers(evidence), sort_keys=True)
    return _three([structure], magnitude, digest(json.dumps(evidence, sort_keys=True)))


def _numbers(data: Any) -> Iterator[float]:
    if _is_number(data):
        yield float(data)
    elif isinstance(data, dict | list | tuple):
        for item in data.values() if isinstance(data, dict) else data:
            yield from _numbers(item)


def _without_numbers(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _without_numbers(item) for name, item in data.items()}
    if isinstance(data, list | tuple):
        return [_without_numbers(item) for item in data]
    return "number" if _is_number(data) else data


def _is_number(data: Any) -> bool:
    return isinstance(data, int | float) and not isinstance(data, bool)


def _three(structure: Iterable[str], magnitude: float, content: str) -> str:
    return " ".join((digest("\n".join(structure))[:8], f"{magnitude:.4f}", content[:16]))


def agree(a: str, b: str, *, same_processor: bool) -> bool:
    """Return whether two digests are equivalent.

    Digests of numbers from two processors are if their first words are equal and their magnitudes nearly so; all others
    have to be equal.

    Args:
        a, b: digests of texts or numbers from this module, or what is recorded instead of them.
        same_processor: whether numbers have to be bitwise equal.
    """
    first, second = a.split(), b.split()
    if same_processor or len(first) != 3 or len(second) != 3:
        return a == b
    near = math.isclose(float(first[1]), float(second[1]), rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return first[0] == second[0] and near
