"""Parameter groups for a compiled model: LoRA+, weight decay by kind, learning rates by layer and adaptation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from graftc.compiler.inspect.trained import TrainedTensor, trained_tensors
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.runtime.compiled import Compiled, CompiledRunner
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.arguments import as_mapping, kind_of
from graftc.specs.errors.diagnostics import GraftError, unknown_name

TABLE_LR = 1e-6
"""The default learning rate for factors of embedding tables under LoRA+, as in its authors' code."""

_OWN = frozenset({"params", "names"})
_NUMBERS = ("lr", "weight_decay", "lr_ratio", "embedding_lr", "layer_decay")


def param_groups(
    compiled: Compiled | CompiledRunner,
    lr: float,
    *,
    weight_decay: float = 0.0,
    lr_ratio: float | None = None,
    embedding_lr: float | None = None,
    layer_decay: float = 1.0,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    only: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Return the trainable tensors as parameter groups for any optimiser with torch's interface.

    Each group has ``params``, ``lr``, ``weight_decay``, ``names`` (of its tensors, in the same order) and any other
    options from ``overrides``. Pass the groups to the Trainer as ``optimizers=(AdamW(groups), None)`` or, to keep its
    own schedule, as ``optimizer_cls_and_kwargs=(AdamW, {"params": groups})``.

    The kind of a tensor follows from the adaptation, site and layer for which it was created. Tensors that are
    currently frozen (`Compiled.train_only`) are left out.

    Args:
        compiled: a compiled model.
        lr: the learning rate.
        weight_decay: the weight decay of matrices, prompts and sparse deltas. Biases, norms, scales and gates have
            none.
        lr_ratio: LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the ratio of the learning rate of the factor next to the
            output, B, to that of A; the authors recommend 16. As in their code and in PEFT's, vectors (biases, norms,
            scales, gates) train at the rate of B. By default all train at ``lr``.
        embedding_lr: the learning rate for factors of embedding tables; by default ``lr``, or 1e-6 with ``lr_ratio``,
            as in the authors' code.
        layer_decay: layer-wise decay (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT): a factor by which the
            learning rate is multiplied once for the last layer, twice for the one before, and so on. Everything that is
            read before the layers counts as one more layer; everything else outside the layers has no decay. Encoder
            and decoder layers are counted separately.
        overrides: other values of the arguments above for some adaptations, by name (``trained`` is the ``train:``
            list, ``tokens`` the added tokens), and further options for their groups, such as ``betas``.
        only: the names of the adaptations whose tensors to return, for ``optimizer.add_param_group`` after
            ``compiled.add``; by default all.

    Raises:
        GraftError: GC073 for values that are out of bounds, GC091 for an unknown adaptation name.
    """
    runner = runner_of(compiled)
    given = {"lr": lr, "weight_decay": weight_decay, "lr_ratio": lr_ratio, "embedding_lr": embedding_lr}
    common = _checked({**given, "layer_decay": layer_decay})
    own = {} if overrides is None else as_mapping(overrides, "overrides", Mapping)
    known = [*runner.spec.owners, TRAIN, TOKENS]
    for name in (*own, *(only or ())):
        if name not in known:
            raise unknown_name("adaptation", name, known)
    for name, values in own.items():
        if taken := _OWN.intersection(as_mapping(values, f"overrides of {name!r}", object)):
            hint = "overrides change the settings and options of groups, not their contents"
            raise GraftError("GC073", f"overrides of {name!r} contain {min(taken)!r}", hint=hint)
    options = {name: _checked({**common, **values}) for name, values in own.items()}
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for item in trained_tensors(runner.compilation):
        if only is not None and item.adaptation not in only:
            continue
        settings = options.get(item.adaptation, common)
        decay = 0.0 if item.kind == "vector" else float(settings["weight_decay"])
        group = {"lr": _rate(item, settings), "weight_decay": decay}
        group |= {name: value for name, value in settings.items() if name not in _NUMBERS}
        # Kinds share a group if no setting distinguishes them; with LoRA+, the kinds are those of its authors' code.
        kind = item.kind if settings["lr_ratio"] is not None else ""
        key = (item.adaptation if item.adaptation in own else "", kind, group["lr"], decay)
        entry = groups.setdefault(key, {"params": [], "names": [], **group})
        entry["params"].append(item.tensor)
        entry["names"].append(item.name)
    return list(groups.values())


def _rate(item: TrainedTensor, settings: Mapping[str, Any]) -> float:
    rate, ratio, table = settings["lr"], settings["lr_ratio"], settings["embedding_lr"]
    if item.kind == "table":
        rate = table if table is not None else rate if ratio is None else TABLE_LR
    elif ratio is not None and item.kind in ("up", "vector"):
        rate *= ratio
    return float(rate * settings["layer_decay"] ** item.below)


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    for name in _NUMBERS:
        value = settings[name]
        if value is None and name in ("lr_ratio", "embedding_lr"):
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value < 0 or (name == "layer_decay" and not 0 < value <= 1):
            shown = repr(value) if number else kind_of(value)
            bounds = "above 0, at most 1" if name == "layer_decay" else "of at least 0"
            raise GraftError("GC073", f"{name} is {shown}", hint=f"pass a number {bounds}")
    return dict(settings)
