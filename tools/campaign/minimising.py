"""Reduction of a case that fails: smaller cases are tried as long as one of them fails in the same way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from tools.campaign.case import Case, check, findings
from tools.campaign.grammar import Layer, Model
from tools.forked import Record

Failure = tuple[str, str, str]
"""A check, its status, and the kind of error or the code."""


def failures_of(record: Record) -> set[Failure]:
    """Return what failed in a record, without figures and messages."""
    failed = findings(record).items()
    return {(name, each["status"], each.get("code") or each.get("error") or "") for name, each in failed}


def minimised(
    case: Case,
    failure: Failure,
    *,
    seconds: float = 120,
    run: Callable[[Case], Record] | None = None,
    tell: Callable[[Case], None] = lambda case: None,
) -> Case:
    """Return the smallest case found that fails in the same way.

    Args:
        case: a case that fails.
        failure: the failure to keep.
        seconds: how long to go on; the smallest case so far counts.
        run: the function that runs a case; by default `check`, as far as the failure needs.
        tell: called with every smaller case that fails.
    """
    until = time.monotonic() + seconds
    run = run or partial(check, only=failure[0])
    case = replace(case, routes=tuple(name for name in case.routes if name == failure[0]))
    progress = True
    while progress:
        progress, at = False, 0
        while at < len(candidates := list(smaller_cases(case))):
            if time.monotonic() > until:
                return case
            if failure in _outcome(candidates[at], run):
                case, progress = candidates[at], True  # the next candidates are mostly those that come after it
                tell(case)
            else:
                at += 1
    return case


def _outcome(case: Case, run: Callable[[Case], Record]) -> set[Failure]:
    try:
        return failures_of(run(case))
    except Exception:  # a description that no longer builds
        return set()


def smaller_cases(case: Case) -> Iterator[Case]:
    """Yield cases that are a step smaller, the largest steps first."""
    spec, adapt = case.spec, case.spec["adapt"]
    for number in range(len(adapt)):
        if len(adapt) > 1:
            yield replace(case, spec={**spec, "adapt": adapt[:number] + adapt[number + 1 :]})
    for key in spec:
        if key != "adapt":
            yield replace(case, spec={name: value for name, value in spec.items() if name != key})
    for number, entry in enumerate(adapt):
        for less in (*_smaller_targets(entry), *_plainer_options(entry)):
            yield replace(case, spec={**spec, "adapt": [*adapt[:number], less, *adapt[number + 1 :]]})
    for model in _smaller_models(case.model):
        yield replace(case, model=model)


def _smaller_targets(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind, values in entry.get("target", {}).items():
        for value in values if len(values) > 1 else ():
            yield {**entry, "target": {**entry["target"], kind: [value]}}


def _plainer_options(entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in entry:
        if key not in ("name", "method", "target"):
            yield {name: value for name, value in entry.items() if name != key}
    for key in ("rank", "length", "bottleneck"):
        if isinstance(entry.get(key), int) and entry[key] > 1:
            yield {**entry, key: 1}


def _smaller_models(model: Model) -> Iterator[Model]:
    if model.family is not None:
        if model.config.get("layers", 1) > 1:
            yield replace(model, config={**model.config, "layers": 1})
        for key in model.config:
            if key not in ("layers", "hidden_size", "num_attention_heads"):
                yield replace(model, config={name: value for name, value in model.config.items() if name != key})
        return
    plain: dict[str, Any] = {"masked": False, "pooled": False, "positions": 0, "outputs": 3, "input": "tokens"}
    for key, value in plain.items():
        if getattr(model, key) != value:
            yield replace(model, **{key: value})
    layers = model.layers
    for number in reversed(range(len(layers))):
        if len(layers) > 1:
            yield replace(model, layers=layers[:number] + layers[number + 1 :])
    for number, layer in enumerate(layers):
        for less in _smaller_layers(layer):
            yield replace(model, layers=(*layers[:number], less, *layers[number + 1 :]))


def _smaller_layers(layer: Layer) -> Iterator[Layer]:
    for number in reversed(range(len(layer.blocks))):
        yield replace(layer, blocks=layer.blocks[:number] + layer.blocks[number + 1 :])
    plain: dict[str, Any] = {"copies": 1, "runs": 1, "norm": "none", "scale": 1.0, "tied": False}
    for key, value in plain.items():
        if getattr(layer, key) != value:
            yield replace(layer, **{key: value})
    if layer.copies > 2:
        yield replace(layer, copies=2)
    for number, block in enumerate(layer.blocks):
        for key, value in block.options.items():
            for other in _PLAINER.get(key, ()):
                if value != other:
                    less = replace(block, options={**block.options, key: other})
                    yield replace(layer, blocks=(*layer.blocks[:number], less, *layer.blocks[number + 1 :]))
                    break


_PLAINER: dict[str, tuple[Any, ...]] = {
    "bias": (False,),
    "causal": (False,),
    "by_hand": (False,),
    "activation": ("relu",),
    "form": ("separate", "elman", "list"),
    "kernel": (1,),
    "groups": (1,),
    "heads": (1,),
    "experts": (2,),
    "chosen": (1,),
    "inner": (4,),
}
"""Plainer values of options; of those that a kind does not have, the case does not build and is not taken."""


def script(case: Case) -> str:
    """Return a short script that runs a case and prints what fails."""
    text = json.dumps(case.to_json(), indent=1)
    return "\n".join(
        (
            "import json",
            "from tools.campaign.case import Case, check, findings",
            f"case = Case.from_json(json.loads('''{text}'''))",
            "print(findings(check(case)))",
            "",
        )
    )
