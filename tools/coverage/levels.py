"""How much of a model is a graph: LoRA on every map that its example calls, at the highest level that holds."""

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
"""From the highest: the model is one graph, its layers are, single maps in them are."""

KINDS = ((nn.Linear, Conv1D), (nn.Conv1d, nn.Conv2d, nn.Conv3d))
"""Maps that are adapted: linear ones, and convolutions in models without."""


def compile_maps(built: Built) -> Compiled:
    """Compile LoRA of rank 1 on each map that the example calls and whose weight is its own and gets a gradient, but
    for maps whose weight the model's Python reads by itself, where an adaptation would be passed over (GC149).

    Raises:
        GraftError: whatever graftc refuses.
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
    """The path of the map that an error says the model's own Python reads; empty where it says something else."""
    found = re.search(r"adapts (\S+?)(\.weight)?, which the model's own Python reads", error.message)
    return found[1] if found is not None and error.code == "GC149" else ""


def _place(path: str) -> str:
    """A path without the numbers of layers."""
    return re.sub(r"\.\d+\.", ".*.", path)


def called_maps(built: Built, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    """Paths of the maps of these kinds that the example calls, in the model's order.

    A weight that several modules hold cannot be folded in one of them, and one without a gradient cannot be trained.
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
            except AssertionError:  # some models ask for train mode there
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
    """Let every parameter have a gradient, and leave none behind."""
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
    """The level of each stack of layers, and that of the main one: the one with most parameters at full size.

    With ``captured``, of a model that could be captured whole, there is no other reason why it is not one graph.
    A model without repeated layers has the level ``graph`` where it is one graph and ``modules`` where it is not.
    """
    stacks = compiled.report.stacks
    called = [stack for stack in stacks if stack.level != "none"]
    if not called:
        return {"level": "modules" if is_live(compiled.compilation.model) else "graph"}
    sizes = {stack.stack: stack.parameters for stack in called}
    if len({stack.level for stack in called}) > 1:
        sizes |= full_size(built.entry, list(sizes))
    main = max(called, key=lambda stack: sizes[stack.stack])
    found: dict[str, Any] = {"level": main.level}
    if any(stack.level != "graph" for stack in stacks):
        found["main"] = main.stack
        found["stacks"] = {stack.stack: stack.level for stack in stacks}
    if main.level == "modules" or (captured and main.level != "graph"):
        found["in_the_way"] = clean(main.reason)
    return found
