"""Hooks on modules inside layers see what they see in the source model; code without hooks has no boundaries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.hooks.boundaries import begin, end
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from graftc.testing.perturb import perturb

IDS = torch.tensor([[5, 6, 7, 8], [4, 3, 2, 1]])
LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.down"]}}


@pytest.fixture(scope="module", params=["llama", "bert"])
def compiled(request: pytest.FixtureRequest) -> Any:
    model = graftc.compile({"adapt": [LORA]}, tiny(request.param)).eval()
    perturb(model, 0.1)
    return model


@contextmanager
def heard(model: nn.Module, paths: list[str]) -> Iterator[list[tuple[str, str, Any]]]:
    """Collect what hooks on modules see: when, the path, and the first argument or the result."""
    seen: list[tuple[str, str, Any]] = []
    handles = []
    for path in paths:

        def before(_: nn.Module, args: Any, path: str = path) -> None:
            seen.append(("before", path, args[0] if args else None))

        def behind(_: nn.Module, args: Any, result: Any, path: str = path) -> None:
            seen.append(("behind", path, result))

        module = model.get_submodule(path)
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(behind)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def leaves(model: nn.Module) -> list[str]:
    """Return the paths of the modules that have parameters and no children."""
    return [path for path, m in model.named_modules() if not m._modules and m._parameters]


def stops(compiled: Any) -> int:
    executables = compiled._graftc.shown.executables.values()
    return sum(node.target in (begin, end) for each in executables for node in each.lowered.graph.nodes)


@torch.no_grad()
def test_they_hear_of_what_they_hear_of_in_the_source(compiled: Any) -> None:
    source = compiled.compilation.model.eval()
    paths = leaves(source)
    assert len(paths) > 12
    with heard(source, paths) as expected:
        source(input_ids=IDS)
    with compiled.disabled(), heard(compiled, paths) as seen:
        compiled(input_ids=IDS)
    of_table = {path for path, m in source.named_modules() if isinstance(m, nn.Embedding)}
    assert [each[:2] for each in seen if each[1] not in of_table] == [
        each[:2] for each in expected if each[1] not in of_table
    ]
    known = {each[:2]: each[2] for each in expected}
    for when, path, value in seen:
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, known[when, path], atol=1e-6, rtol=1e-5)
    compared = [path for when, path, value in seen if when == "behind" and isinstance(value, Tensor)]
    assert len(compared) > 12


@torch.no_grad()
def test_what_they_hear_is_adapted_and_outputs_are_the_same(compiled: Any) -> None:
    before = compiled(input_ids=IDS).logits
    path = next(path for path in leaves(compiled.compilation.model) if path.endswith(("q_proj", "query")))
    with compiled.disabled(), heard(compiled, [path]) as plain:
        compiled(input_ids=IDS)
    with heard(compiled, [path]) as adapted:
        assert torch.equal(compiled(input_ids=IDS).logits, before)
        assert stops(compiled) > 0
    assert torch.equal(plain[0][2], adapted[0][2]) and not torch.allclose(plain[1][2], adapted[1][2])
    assert torch.equal(compiled(input_ids=IDS).logits, before)
    assert stops(compiled) == 0, "code is as it was without hooks"


def test_gradients_reach_what_they_hear(compiled: Any) -> None:
    path = next(path for path in leaves(compiled.compilation.model) if path.endswith(("down_proj", "output.dense")))
    expected = copy.deepcopy(compiled)
    labels = {"labels": IDS[:, 0] % 2} if "Sequence" in type(compiled).__name__ else {"labels": IDS}
    expected(input_ids=IDS, **labels).loss.backward()
    own = copy.deepcopy(compiled)
    with heard(own, [path]) as seen:
        loss = own(input_ids=IDS, **labels).loss
        (gradient,) = torch.autograd.grad(loss, seen[1][2], retain_graph=True)
        loss.backward()
    assert float(gradient.abs().max()) > 0
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.get_parameter(name).grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_results_may_be_others_of_the_same_kind(compiled: Any) -> None:
    source = compiled.compilation.model.eval()
    path = next(path for path in leaves(source) if path.endswith(("up_proj", "intermediate.dense")))
    logits = []
    for model in (source, compiled):
        handle = model.get_submodule(path).register_forward_hook(lambda _, args, result: result * 2)
        with compiled.disabled():
            logits.append(model(input_ids=IDS).logits)
        handle.remove()
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)
    handle = compiled.get_submodule(path).register_forward_hook(lambda _, args, result: result[:1])
    with pytest.raises(GraftError, match="GC043"):
        compiled(input_ids=IDS)
    handle.remove()


@torch.no_grad()
def test_arguments_may_only_be_read(compiled: Any) -> None:
    module = compiled.get_submodule(leaves(compiled.compilation.model)[-2])
    for handle in (
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        module.register_forward_pre_hook(lambda _, args, kwargs: kwargs.update(more=1), with_kwargs=True),
    ):
        with pytest.raises(GraftError, match=r"GC043.*only read"):
            compiled(input_ids=IDS)
        handle.remove()
    compiled(input_ids=IDS)


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own(compiled: Any) -> None:
    path = leaves(compiled.compilation.model)[-2]
    with heard(compiled, [path]) as seen:
        compiled(input_ids=IDS)
        count = len(seen)
        other = copy.deepcopy(compiled)
        other.get_submodule(path)._forward_hooks.clear()
        other.get_submodule(path)._forward_pre_hooks.clear()
        other(input_ids=IDS)
    assert count == len(seen) == 2 and stops(other) == 0
