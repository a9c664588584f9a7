"""One adaptation in graftc and in peft, with the same tensors: comparison of outputs, gradients and merged weights.

A method needs one `Names` (peft's names of its tensors) and a `Case` per family; see ``test_peft.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.weights.names import RESERVED
from graftc.runtime.compiled import Compiled
from graftc.testing.compare import SHAPES, flat, inputs_for, largest_difference, outputs_of
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.comparing import every_tensor
from tests.kit.refusals import refused

TOLERANCE = 1e-5
MODULES = {
    "bert": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "v_proj", "fc2"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
}
"""Suffixes of module paths. GPT-2's and GPT-NeoX's fused matrices are adapted as a whole, as in peft."""


@dataclass(frozen=True)
class Names:
    """Peft's names of the tensors of a method. A tensor that differs only in shape is reshaped.

    Attributes:
        parts: for each part, the suffix after a module's path: ``{"A": "lora_A.default.weight"}``.
        shared: for each part, the full name of a tensor of the adaptation: ``{"A": "base_model.vera_A.default"}``.
        drawn: parts with integers that both libraries draw from the same seed, which peft keeps outside its modules.
    """

    parts: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    drawn: frozenset[str] = frozenset()

    def of(self, name: str) -> str:
        """Return peft's name for a tensor of ours."""
        module, _, rest = f".{name}".partition(f".{RESERVED}.")
        part = rest.rpartition(".")[2]
        return f"base_model.model{module}.{self.parts[part]}" if module else self.shared[part]


@dataclass(frozen=True)
class Case:
    """One method on one family, in both libraries.

    Attributes:
        family: a key of `graftc.testing.families.FAMILIES`.
        adaptation: an entry of a spec's ``adapt``.
        config: a function that creates peft's config, called with the imported package.
        names: the names of the tensors.
        noise: standard deviation of the noise that is added to every trainable tensor.
        merges: whether peft can merge the adaptation.
    """

    family: str
    adaptation: Mapping[str, Any]
    config: Callable[[Any], Any]
    names: Names
    noise: float = 0.1
    merges: bool = True


@dataclass(frozen=True)
class Pair:
    """Both models with the same tensors, in eval mode.

    Attributes:
        ours, theirs: the adapted models, each with its own copy of the base.
        base: the model that both adapt.
        tensors: peft's trained tensor for each of ours, by our name.
    """

    ours: Compiled
    theirs: nn.Module
    base: nn.Module
    tensors: Mapping[str, Tensor]

    def outputs(self) -> float:
        """Return the largest difference of outputs at three shapes; fail if the adaptation has no effect."""
        largest = 0.0
        for sizes in SHAPES:
            inputs = inputs_for(self.ours, sizes)
            ours = outputs_of(self.ours, inputs)
            assert largest_difference(ours, outputs_of(self.base, inputs)) > 1e-3, "the tensors have no effect"
            largest = max(largest, largest_difference(ours, outputs_of(self.theirs, inputs)))
        return largest

    def gradients(self) -> float:
        """Return the largest difference of a trained tensor's gradients, over its largest gradient or 1."""
        inputs, mine = inputs_for(self.ours), dict(self.ours.named_parameters())
        for model in (self.ours, self.theirs):
            model.zero_grad()
            _random_loss(model, inputs, seed=0).backward()
        worst = 0.0
        for name, other in self.tensors.items():
            a, b = mine[name].grad, other.grad
            assert a is not None and b is not None, name
            assert bool(a.any()), f"{name} has no gradient"
            worst = max(worst, float((a - b.reshape(a.shape)).abs().max() / a.abs().max().clamp_min(1)))
        return worst

    def steps(self, count: int = 3) -> float:
        """Return the largest difference of trained tensors after steps of AdamW; both models are changed."""
        mine = dict(self.ours.named_parameters())
        for model, tensors in (
            (self.ours, [mine[name] for name in self.tensors]),
            (self.theirs, self.tensors.values()),
        ):
            inputs = inputs_for(self.ours)
            optimiser = torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0.01)
            for step in range(count):
                optimiser.zero_grad()
                _random_loss(model, inputs, seed=step).backward()
                optimiser.step()
        pairs = [(mine[name].detach(), other.detach()) for name, other in self.tensors.items()]
        return max(float((own - other.reshape(own.shape)).abs().max()) for own, other in pairs)

    def merged(self) -> float:
        """Return the largest difference of outputs after merging both; peft's model is no longer adapted afterwards."""
        ours, theirs = self.ours.merge().to_transformers(), self.theirs.merge_and_unload()  # type: ignore[operator]
        calls = [inputs_for(self.ours, sizes) for sizes in SHAPES]
        return max(largest_difference(outputs_of(ours, i), outputs_of(theirs, i)) for i in calls)


def _random_loss(model: nn.Module, inputs: Mapping[str, Any], seed: int) -> Tensor:
    """Return the sum of all outputs with a gradient, weighted at random."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [leaf for leaf in flat(model(**inputs)) if leaf.requires_grad]
    return torch.stack([(leaf * torch.randn(leaf.shape, generator=generator)).sum() for leaf in leaves]).sum()


def pair(case: Case, base: nn.Module | None = None) -> Pair:
    """Adapt one tiny model with both libraries, and copy our tensors to peft, all of them perturbed.

    Args:
        case: the adaptation.
        base: the model; by default that of the case's family.

    Raises:
        AssertionError: if the two do not adapt the same places with tensors of the same sizes.
    """
    peft = pytest.importorskip("peft")
    base = tiny(case.family) if base is None else base
    ours = graftc.compile({"adapt": [dict(case.adaptation)]}, copy.deepcopy(base), seed=0).eval()
    perturb(ours, case.noise)
    theirs = peft.get_peft_model(copy.deepcopy(base), case.config(peft)).eval()
    peft_tensors = every_tensor(theirs)
    trained = {name for name, tensor in theirs.named_parameters() if tensor.requires_grad}
    mine = dict(ours.named_parameters())
    counterparts: dict[str, Tensor] = {}
    for name, tensor in ours.adapter_state_dict().items():
        if name not in mine:
            continue  # a counter of steps, say, which peft does not save
        if name.rpartition(".")[2] in case.names.drawn:
            continue
        theirs_name = case.names.of(name)
        other = peft_tensors[theirs_name]
        assert other.numel() == tensor.numel(), f"{name} is {list(tensor.shape)}, peft's is {list(other.shape)}"
        with torch.no_grad():
            other.copy_(tensor.reshape(other.shape))
        if mine[name].requires_grad:
            counterparts[name] = other
            trained.remove(theirs_name)
    assert not trained, f"peft trains more: {sorted(trained)[:4]}"
    return Pair(ours, theirs, base, counterparts)


def check(case: Case, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Check that outputs, gradients and merged outputs of both agree, and return the largest difference of each.

    Raises:
        AssertionError: if one of them differs by more than ``tolerance``.
    """
    models = pair(case)
    differences = {"outputs": models.outputs(), "gradients": models.gradients(), "merged outputs": models.merged()}
    for name, value in differences.items():
        assert value <= tolerance, f"{name} differ by {value:.2e} from peft's"
    return differences


def check_float64(case: Case, tolerance: float = 1e-12) -> dict[str, float]:
    """Check in float64 that outputs, gradients, three steps of AdamW and merged outputs of both agree.

    Returns:
        The largest difference of each.

    Raises:
        AssertionError: if one of them differs by more than ``tolerance``.
    """
    models = pair(case, tiny(case.family).double())
    differences = {"outputs": models.outputs(), "gradients": models.gradients(), "steps": models.steps()}
    if case.merges:
        differences["merged outputs"] = models.merged()
    for name, value in differences.items():
        assert value <= tolerance, f"{name} differ by {value:.2e} from peft's"
    return differences


def globs(modules: list[str]) -> dict[str, Any]:
    """Return a target that matches the same modules as peft's list of suffixes."""
    return {"modules": [f"**.{name}" for name in modules]}


def check_nothing_is_written(compiled: Any, folder: Path, words: str) -> None:
    """Check that an adapter of sites that peft's method does not support is not exported.

    Args:
        compiled: the model with the adapter.
        folder: an empty folder.
        words: the description of such a site in the error.
    """
    error = refused(compiled.export, folder / "peft", format="peft", code="GC115")
    assert words in str(error) and not list(folder.iterdir())
