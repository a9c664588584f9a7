"""The orientation of the experts' factors in a file, which depends on the PEFT release that wrote it.

Up to 0.18, the first factor reads the middle axis of a weight ``[experts, a, b]``, regardless of its meaning; from 0.19
on, it reads the experts' inputs, which are the last axis unless their module sets `is_transposed`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from graftc.compiler.compilation import Compilation
from graftc.runtime.interop.peft.folder import PeftAdapter
from graftc.runtime.interop.peft.pairs import Pair, pairs_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign.config import AdapterConfig

SINCE = (0, 19)
"""The first release with the layout that `pairs_of` writes."""

_RELEASE = re.compile(r"(\d+)\.(\d+)(\.\d+)*(\.post\d+)?")


def pairs_in(adapter: PeftAdapter, compilation: Compilation) -> list[Pair]:
    """Return the pairs for a folder's layout: the one that its shapes fit or, if both fit, that of its `peft_version`.

    Raises:
        GraftError: GC113 if nothing distinguishes the layouts.
    """
    named = {f"{module.path}.{module.parameter}" for module in adapter.modules if module.named}
    newer, older = pairs_of(compilation, named=named), pairs_of(compilation, older=True, named=named)
    if newer == older or not _fits(adapter, compilation, older):
        return newer
    if not _fits(adapter, compilation, newer):
        return older
    if (release := release_of(adapter.config)) is not None:
        return newer if release >= SINCE else older
    first = next(pair.site for pair, other in zip(newer, older, strict=True) if pair != other)
    message = (
        f"the factors of {first} may be those of PEFT up to 0.18 or of PEFT from 0.19 on, which swaps the two: "
        "the weights are square, so both fit, and peft_version does not name the release that wrote them"
    )
    hint = 'set "peft_version" in the config to the release that wrote the file, such as "0.18.1" or "0.19.0"'
    raise GraftError("GC113", message, place=adapter.in_config("peft_version"), hint=hint)


def release_of(config: AdapterConfig) -> tuple[int, int] | None:
    """Return the PEFT release that wrote a config; None if the config does not name it."""
    release = _RELEASE.fullmatch(config.peft_version or "")
    return None if release is None else (int(release[1]), int(release[2]))


def _fits(adapter: PeftAdapter, compilation: Compilation, pairs: Sequence[Pair]) -> bool:
    """Return whether all factors of experts in the file have the shapes of the given pairs."""
    own = [pair for pair in pairs if pair.shaped.experts is not None and pair.key in adapter.shapes]
    like = {pair: torch.empty(compilation.store.get(pair.tensor).shape, device="meta") for pair in own}
    return all(tuple(pair.write(tensor).shape) == adapter.shapes[pair.key] for pair, tensor in like.items())
