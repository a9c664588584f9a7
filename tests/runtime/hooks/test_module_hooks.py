"""Hooks on modules inside layers see what they see in the source model; code without hooks has no boundaries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.runtime.hooks.boundaries import begin, end
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.models import adapted

IDS = torch.tensor([[5, 6, 7, 8], [4, 3, 2, 1]])
LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.down"]}}


@pytest.fixture(scope="module", params=["llama", "bert"])
def adapted_model(request: pytest.FixtureRequest) -> Any:
    return adapted(request.param, LORA, noise=0.1)


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


@pytest.mark.slow
@torch.no_grad()
def test_they_hear_of_what_they_hear_of_in_the_source(adapted_model: Any) -> None:
    source = adapted_model.compilation.model.eval()
    paths = leaves(source)
    assert len(paths) > 12
    with heard(source, paths) as expected:
        source(input_ids=IDS)
    with adapted_model.disabled(), heard(adapted_model, paths) as seen:
        adapted_model(input_ids=IDS)
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
def test_what_they_hear_is_adapted_and_outputs_are_the_same(adapted_model: Any) -> None:
    before = adapted_model(input_ids=IDS).logits
    path = next(path for path in leaves(adapted_model.compilation.model) if path.endswith(("q_proj", "query")))
    with adapted_model.disabled(), heard(adapted_model, [path]) as plain:
        adapted_model(input_ids=IDS)
    with heard(adapted_model, [path]) as own:
        assert torch.equal(adapted_model(input_ids=IDS).logits, before)
        assert stops(adapted_model) > 0
    assert torch.equal(plain[0][2], own[0][2]) and not torch.allclose(plain[1][2], own[1][2])
    assert torch.equal(adapted_model(input_ids=IDS).logits, before)
    assert stops(adapted_model) == 0, "code is as it was without hooks"


@pytest.mark.slow
def test_gradients_reach_what_they_hear(adapted_model: Any) -> None:
    path = next(
        path for path in leaves(adapted_model.compilation.model) if path.endswith(("down_proj", "output.dense"))
    )
    expected = copy.deepcopy(adapted_model)
    labels = {"labels": IDS[:, 0] % 2} if "Sequence" in type(adapted_model).__name__ else {"labels": IDS}
    expected(input_ids=IDS, **labels).loss.backward()
    own = copy.deepcopy(adapted_model)
    with heard(own, [path]) as seen:
        loss = own(input_ids=IDS, **labels).loss
        (gradient,) = torch.autograd.grad(loss, seen[1][2], retain_graph=True)
        loss.backward()
    assert float(gradient.abs().max()) > 0
    for name, parameter in own.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.get_parameter(name).grad, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_results_may_be_others_of_the_same_kind(adapted_model: Any) -> None:
    source = adapted_model.compilation.model.eval()
    path = next(path for path in leaves(source) if path.endswith(("up_proj", "intermediate.dense")))
    logits = []
    for model in (source, adapted_model):
        handle = model.get_submodule(path).register_forward_hook(lambda _, args, result: result * 2)
        with adapted_model.disabled():
            logits.append(model(input_ids=IDS).logits)
        handle.remove()
    torch.testing.assert_close(*logits, atol=1e-6, rtol=1e-5)
    handle = adapted_model.get_submodule(path).register_forward_hook(lambda _, args, result: result[:1])
    with pytest.raises(GraftError, match="GC043"):
        adapted_model(input_ids=IDS)
    handle.remove()


@torch.no_grad()
def test_arguments_may_only_be_read(adapted_model: Any) -> None:
    module = adapted_model.get_submodule(leaves(adapted_model.compilation.model)[-2])
    for handle in (
        module.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        module.register_forward_pre_hook(lambda _, args, kwargs: kwargs.update(more=1), with_kwargs=True),
    ):
        with pytest.raises(GraftError, match=r"GC043.*only read"):
            adapted_model(input_ids=IDS)
        handle.remove()
    adapted_model(input_ids=IDS)


@torch.no_grad()
def test_a_copy_has_hooks_of_its_own(adapted_model: Any) -> None:
    path = leaves(adapted_model.compilation.model)[-2]
    with heard(adapted_model, [path]) as seen:
        adapted_model(input_ids=IDS)
        count = len(seen)
        other = copy.deepcopy(adapted_model)
        other.get_submodule(path)._forward_hooks.clear()
        other.get_submodule(path)._forward_pre_hooks.clear()
        other(input_ids=IDS)
    assert count == len(seen) == 2 and stops(other) == 0
