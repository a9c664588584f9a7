"""The level of a model, which says how much of it is a graph: LoRA on every map that its example calls."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graftc
from graftc.compiler.live.elements import is_live
from graftc.runtime.compiled import Compiled
from graftc.testing.compare import flat
from tools.coverage.build import Built, full_size
from tools.coverage.text import clean

LEVELS = ("graph", "layers", "modules")
"""The levels, highest first: the model is one graph, each of its layers is, or single maps in them are."""

KINDS = ((nn.Linear, Conv1D), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
"""The maps that are adapted: linear ones, or convolutions in models without linear maps."""


def compile_maps(built: Built) -> Compiled:
    """Compile LoRA of rank 1 on each map that the example calls and whose weight is its own and gets a gradient.

    Maps whose weight the model's Python reads directly are left out, since it would bypass an adaptation (GC149).

    Raises:
        GraftError: graftc refuses the model.
        ValueError: no such map is called.
    """
    for kinds in KINDS:
        names = called_maps(built, kinds)
        while names:
            spec = {"adapt": [{"name": "coverage", "method": "lora", "rank": 1, "target": {"modules": names}}]}
            try:
                return graftc.compile(spec, built.model, built.inputs, cache=False)
            except graftc.GraftError as error:
                others = [name for name in names if _place(name) != _place(_read_by_python(error))]
                if len(others) == len(names):
                    raise
                names = others
    raise ValueError("the example calls no linear map and no convolution with a weight of its own")


def _read_by_python(error: graftc.GraftError) -> str:
    """Return the path of the map that the model's own Python reads according to an error, or an empty string."""
    match = re.search(r"adapts (\S+?)(\.weight)?, which the model's own Python reads", error.message)
    return match[1] if match is not None and error.code == "GC149" else ""


def _place(path: str) -> str:
    """Return a path without the numbers of layers."""
    return re.sub(r"\.\d+\.", ".*.", path)


def called_maps(built: Built, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Return the paths of the maps of these kinds that the example calls, in the model's order.

    A weight that several modules share cannot be folded in one of them, and one without a gradient cannot be trained.
    """
    model = built.model
    shared = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    maps = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    maps = {path: module for path, module in maps.items() if shared[id(module.weight)] == 1}
    called: set[int] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(id(module))) for module in maps.values()]
    try:
        with _gradients(model):
            try:
                _backward(built)
            except AssertionError:  # some models assert that they are in train mode
                model.train()
                _backward(built)
                model.eval()
            return [
                path
                for path, module in maps.items()
                if id(module) in called and isinstance(module.weight, Tensor) and module.weight.grad is not None
            ]
    finally:
        for hook in hooks:
            hook.remove()


def _backward(built: Built) -> None:
    outputs = [value for value in flat(built.model(**built.inputs)) if value.requires_grad]
    if outputs:
        torch.autograd.backward([value.float().square().mean() for value in outputs])


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    """Let every parameter have a gradient while the block runs, and leave none behind."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        model.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
            parameter.grad = None


def levels(compiled: Compiled, built: Built, captured: bool = False) -> dict[str, Any]:
    """Return the level of each stack of layers, and of the main one, which has the most parameters at full size.

    If ``captured`` is true, the model could be captured whole, and the reason for its level is included, since no other
    one is known. A model without repeated layers has the level ``graph`` if it is one graph, and ``modules`` otherwise.
    """
    stacks = compiled.report.stacks
    called = [stack for stack in stacks if stack.level != "none"]
    if not called:
        return {"level": "modules" if is_live(compiled.compilation.model) else "graph"}
    sizes = {stack.stack: stack.parameters for stack in called}
    if len({stack.level for stack in called}) > 1:
        sizes |= full_size(built.entry, list(sizes))
    main = max(called, key=lambda stack: sizes[stack.stack])
    facts: dict[str, Any] = {"level": main.level}
    if any(stack.level != "graph" for stack in stacks):
        facts["main"] = main.stack
        facts["stacks"] = {stack.stack: stack.level for stack in stacks}
    if main.level == "modules" or (captured and main.level != "graph"):
        facts["in_the_way"] = clean(main.reason)
    return facts
