"""A reference for what an adapter folder computes in each layout, written out with explicit row and column indices.

Conversions are checked against it. It shares nothing with the code that reads and writes the layouts except their names
and the matching of patterns to paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.runtime.interop.layouts.folder import named
from graftc.runtime.interop.layouts.layout import STACKED, AdapterLayout
from graftc.runtime.interop.layouts.plain import AttentionSizes
from graftc.specs.foreign.config import matching
from graftc.specs.regexes import RegexMatcher

Probe = Callable[[int], Tensor]


def responses(
    layout: AdapterLayout,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    probe: Probe,
    heads: AttentionSizes | None = None,
) -> dict[str, Tensor]:
    """Return what the adapter adds to each map's output, ``[out, probes]`` in float64, by the map's path.

    The path of an expert's map is ``<...>.experts.3.gate_proj``.

    Args:
        layout: the tensors' layout.
        tensors: the tensors by key.
        config: the contents of ``adapter_config.json``.
        probe: function that returns float64 inputs ``[in, probes]`` for a size, always the same for a given size.
        heads: the base's attention sizes, if rows are stored in rotation pairs.
    """
    results: dict[str, Tensor] = {}
    stated = _Config(config)
    a_word, b_word = layout.factors
    for key, down in tensors.items():
        for word, other in ((f".{a_word}.weight", f".{b_word}.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if key.endswith(word):
                path = key[len(layout.prefix) : -len(word)]
                pair = _Pair(down.double(), tensors[key[: -len(word)] + other].double(), probe)
                for site, value in _sites(layout, path, pair, stated):
                    if layout.rotary and heads is not None and site.endswith(("q_proj", "k_proj")):
                        value = unpaired(value, heads.size)
                    results[site] = value
    return results


class _Pair:
    """A pair of factors, and the products of selected rows of ``A`` and columns of ``B``."""

    def __init__(self, down: Tensor, up: Tensor, probe: Probe) -> None:
        self.down, self.up, self.probe = down, up, probe

    def product(self, rows: list[int] | None = None, columns: list[int] | None = None) -> Tensor:
        down = self.down if rows is None else torch.stack([self.down[row] for row in rows])
        up = self.up if columns is None else torch.stack([self.up[:, column] for column in columns], 1)
        return up @ (down @ self.probe(down.shape[-1]))


def _sites(layout: AdapterLayout, path: str, pair: _Pair, config: _Config) -> Iterator[tuple[str, Tensor]]:
    bare = path.removesuffix(".base_layer")
    if layout.experts == "stacked" and pair.down.dim() == 3:
        yield from _stacked(path, pair, config)
    elif layout.experts in ("flat", "flat_by_expert") and bare.endswith(".experts"):
        yield from _flat(layout, path, bare, pair, config)
    else:
        name = named(layout, path, back=True)
        scale = config.scale(path, patterns=not layout.uniform)
        yield name, scale * pair.product()


def _stacked(path: str, pair: _Pair, config: _Config) -> Iterator[tuple[str, Tensor]]:
    module, _, last = path.rpartition(".")
    word = {theirs: ours for ours, theirs in STACKED.items()}[last]
    scale = config.scale(path, patterns=False)
    for expert in range(max(pair.down.shape[0], pair.up.shape[0])):
        down = pair.down[expert if pair.down.shape[0] > 1 else 0]
        up = pair.up[expert if pair.up.shape[0] > 1 else 0]
        yield f"{module}.{expert}.{word}", scale * (up @ (down @ pair.probe(down.shape[-1])))


def _flat(layout: AdapterLayout, path: str, bare: str, pair: _Pair, config: _Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the experts' responses for factors in PEFT's flat form: row ``e * r + k`` of A is rank k of expert e.

    In B, this rank is column ``k * E + e``, or column ``e * r + k`` in the form `flat_by_expert`.
    """
    targets = [str(name).rpartition(".")[2] for name in config.own.get("target_parameters") or ()]
    inner = path != bare or targets == ["gate_up_proj"]
    parameter = "gate_up_proj" if inner else "down_proj"
    rank = config.rank(f"{bare}.{parameter}")
    experts = pair.down.shape[0] // rank
    scale = config.scale(f"{bare}.{parameter}", patterns=True)
    for expert in range(experts):
        rows = [expert * rank + k for k in range(rank)]
        fast = layout.experts == "flat"
        columns = [k * experts + expert if fast else expert * rank + k for k in range(rank)]
        value = scale * pair.product(rows, columns)
        if parameter == "down_proj":
            yield f"{bare}.{expert}.down_proj", value
        else:
            half = value.shape[0] // 2
            yield f"{bare}.{expert}.gate_proj", value[:half]
            yield f"{bare}.{expert}.up_proj", value[half:]


class _Config:
    """The ranks and scales that a config defines, taking its patterns into account if requested."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self.own, self._matcher = own, RegexMatcher()

    def _pattern(self, name: str, path: str) -> Any:
        given = self.own.get(name) or {}
        key = matching(list(given), path, self._matcher)
        return None if key is None else given[key]

    def rank(self, path: str, *, patterns: bool = True) -> int:
        pattern = self._pattern("rank_pattern", path) if patterns else None
        return int(self._stated("r") if pattern is None else pattern)

    def scale(self, path: str, *, patterns: bool) -> float:
        rank = self.rank(path, patterns=patterns)
        alpha = self._pattern("alpha_pattern", path) if patterns else None
        value = float(self._stated("lora_alpha") if alpha is None else alpha)
        return value / (rank**0.5 if self.own.get("use_rslora") else rank)

    def _stated(self, name: str) -> Any:
        return self.own.get(name, 8)  # peft's default for both


def unpaired(value: Tensor, size: int) -> Tensor:
    """Return the rows ordered by rotation halves: row ``2 i + j`` of a head becomes row i of its half j."""
    rows = []
    for start in range(0, value.shape[0], size):
        rows += [value[start + 2 * i + j] for j in range(2) for i in range(size // 2)]
    return torch.stack(rows)
