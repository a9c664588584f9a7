"""A base is the one that was adapted only if it computes what it did: config and weights do not show everything."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.loading import same_function
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import perturb, tiny

IDS = torch.tensor([[3, 7, 5, 20, 11]])
SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, torch.Tensor]:
    """An artifact, the tensors of its base, and the outputs of the adapted model."""
    model: Any = tiny("llama").eval()
    compiled: Any = graftc.compile(SPEC, model).eval()
    perturb(compiled)
    path = compiled.save(tmp_path_factory.mktemp("written") / "artifact")
    return path, model.state_dict(), compiled(IDS).logits


def base(tensors: Any) -> Any:
    model: Any = tiny("llama").eval()
    model.load_state_dict(tensors)
    return model


def with_scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling = 0.9


def with_hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)


def with_other_code(model: Any) -> None:
    norm = model.model.norm
    plain = norm.forward
    norm.forward = lambda x: 2 * plain(x)


CHANGES = [with_scaling, with_hook, with_other_code]


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_computes_something_else_is_refused(written: Any, change: Any) -> None:
    path, tensors, _ = written
    model = base(tensors)
    change(model)
    with pytest.raises(GraftError, match=r"GC087: .* which computes something else: output logits differs"):
        graftc.load(path, model)


@pytest.mark.parametrize("change", CHANGES)
def test_with_other_versions_it_is_a_warning(written: Any, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release of transformers may compute something else on purpose, so the artifact is still loaded."""
    path, tensors, _ = written
    model = base(tensors)
    change(model)
    monkeypatch.setattr(same_function, "are_installed", lambda versions: False)
    with pytest.warns(GraftWarning, match="GC095: LlamaForCausalLM does not compute what it did"):
        graftc.load(path, model)


def test_a_base_that_differs_in_nothing_that_it_computes_is_loaded(written: Any) -> None:
    path, tensors, expected = written
    model, seen = base(tensors), []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        loaded: Any = graftc.load(path, model).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected)


def test_nothing_is_run_if_the_capture_is_the_artifacts_own(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tensors, expected = written

    def fails(*args: Any) -> Any:
        raise AssertionError("the base was run")

    monkeypatch.setattr(same_function, "anchor", fails)
    loaded: Any = graftc.load(path, base(tensors)).eval()
    torch.testing.assert_close(loaded(IDS).logits, expected)


def test_an_artifact_of_a_changed_model_needs_the_change(tmp_path: Path) -> None:
    """The folder of the base does not have it, so what the artifact names is another model."""
    folder = tmp_path / "base"
    tiny("llama").save_pretrained(folder)
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    with_hook(model)
    compiled: Any = graftc.compile(SPEC, model).eval()
    path = compiled.save(tmp_path / "artifact")
    with pytest.raises(GraftError, match="GC087"):
        graftc.load(path)
    loaded: Any = graftc.load(path, model).eval()
    torch.testing.assert_close(loaded(IDS).logits, compiled(IDS).logits)


@pytest.mark.parametrize(
    ("method", "family"), [("prompt", "bert"), ("prompt", "llama"), ("prompt", "t5"), ("prefix", "llama")]
)
def test_the_base_of_virtual_tokens_is_compared_as_well(method: str, family: str, tmp_path: Path) -> None:
    """A graph that has room for virtual tokens is not the base's own function, and is not compared with it."""
    model: Any = tiny(family).eval()
    compiled: Any = graftc.compile({"adapt": [{"method": method, "length": 3}]}, model)
    perturb(compiled)
    path = compiled.save(tmp_path / "artifact")
    norm = next(module for name, module in model.named_modules() if name.lower().endswith("norm"))
    unchanged = norm.register_forward_hook(lambda module, args, output: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        graftc.load(path, model)
    unchanged.remove()
    norm.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(GraftError, match=r"GC087: .* which computes something else"):
        graftc.load(path, model)
