"""Check that an adapter fits a base, and that the base stores its experts as the layouts assume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from graftc.runtime.interop.layouts.layout import AdapterLayout
from graftc.runtime.interop.layouts.plain import EXPERT, PlainAdapter
from graftc.runtime.sources.models import load_folder
from graftc.specs.errors.diagnostics import GraftError, Place

_FLAT = ("flat", "flat_by_expert")
_WAY_OUT = "merge the adapter as it is, or import it: graftc merge --stream and graftc import-peft look at the model"


def require_fitting(adapter: PlainAdapter, base: Path) -> None:
    """Raise if the adapter has maps that the base lacks or stores with different sizes; experts are not checked.

    Nothing is checked if the base cannot be built, for example because transformers lacks its class.

    Raises:
        GraftError: GC069, which lists these maps.
    """
    try:
        model = load_folder(base, meta=True)
    except GraftError:
        return
    modules = dict(model.named_modules())
    wrong = []
    for path, update in adapter.updates.items():
        weight = getattr(modules.get(path), "weight", None)
        if EXPERT.fullmatch(path) is not None:
            continue
        if not isinstance(weight, Tensor):
            wrong.append(f"it has no {path}")
        elif sorted(sizes := [update.rows, update.down.shape[-1]]) != sorted(weight.shape):
            wrong.append(f"{path} is {list(weight.shape)}, but the adapter is for {sizes}")
    if wrong:
        message = f"the adapter is for a base other than {base}: {wrong[0]}"
        raise GraftError("GC069", message, place=Place(str(base)), details=tuple(wrong[1:30]))


def require_usual_experts(adapter: PlainAdapter, layouts: tuple[AdapterLayout, ...], base: Path | None) -> None:
    """Raise if experts have to be split or fused but the base does not store them as the layouts assume.

    The layouts assume ``[experts, out, in]``, with the gate's rows above those of the up projection. gpt-oss and
    Llama 4 store experts differently under the same keys.

    Args:
        adapter: the adapter to convert.
        layouts: the layouts that are read and written.
        base: the base's folder; its config is enough.

    Raises:
        GraftError: GC069 if the base is not available or stores its experts differently; GC032 if its config cannot
            be read.
    """
    if not adapter.has_experts or not any(layout.experts in _FLAT for layout in layouts):
        return
    if base is None:
        message = "the adapter has experts, whose order its keys do not show: the base is needed, or its config.json"
        raise GraftError("GC069", message, hint="name the folder of the base: --model MODEL")
    model = load_folder(base, meta=True)
    wrong: dict[str, None] = {}
    for path in adapter.updates:
        match = EXPERT.fullmatch(path)
        if match is not None and (reason := _unusual(model, match["module"], adapter)) is not None:
            wrong[f"{match['module']}: {reason}"] = None
    if wrong:
        message = f"the layouts do not match the experts of {type(model).__name__}: {next(iter(wrong))}"
        raise GraftError("GC069", message, place=Place(str(base)), hint=_WAY_OUT, details=tuple(wrong))


def _unusual(model: nn.Module, path: str, adapter: PlainAdapter) -> str | None:
    """Return how the storage of experts differs from the layouts' assumptions; None if it does not."""
    try:
        module: Any = model.get_submodule(path)
    except AttributeError:
        return "the base has no such module"
    both, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(both, Tensor) or not isinstance(down, Tensor) or both.dim() != 3 or down.dim() != 3:
        return "its gate and up projections are not one tensor of all experts"
    if getattr(module, "is_transposed", False) or (both.shape[1], both.shape[2]) != (2 * down.shape[2], down.shape[1]):
        return "its matrices are stored as [in, out]"
    if not getattr(module, "is_concatenated", True):
        return "the rows of the gate and up projections alternate"
    sizes = {"gate_proj": both[:, : both.shape[1] // 2], "up_proj": both[:, both.shape[1] // 2 :], "down_proj": down}
    for word, weight in sizes.items():
        update = adapter.updates.get(f"{path}.{word}")
        if update is not None and (update.experts, update.rows, update.down.shape[-1]) != tuple(weight.shape):
            return f"its {word} is {list(weight.shape)}, which does not match the adapter's"
    return None
