"""Comparisons for methods that adapt linear maps: updates, stacks of adaptations, artifacts and packed bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.runtime.model.runner import runner_of
from graftc.testing import largest_difference, outputs_of, perturb, same_bits, tiny
from graftc.testing.compare import inputs_for
from tests.kit.dense_twins import dense_twin
from tests.kit.models import fresh

DOWN = {"bert": "bert.encoder.layer.1.output.dense", "gpt2": "transformer.h.1.mlp.c_proj"} | {
    "llama": "model.layers.1.mlp.down_proj"
}
"""The path of the second layer's ``ffn.down``, by family."""


class Mixed(nn.Module):
    """Convolutions, one of them with groups, a layer, and a product with a matrix on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.grouped = nn.Conv2d(4, 8, 3, padding=1), nn.Conv1d(8, 12, 3, groups=2)
        self.point, self.left = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 4, 5, 7]`` to ``[batch, 8, 33]``."""
        hidden = self.grouped(torch.tanh(self.wide(x)).flatten(2))
        outputs: Tensor = self.left.weight @ torch.tanh(self.point(torch.tanh(hidden).mT)).mT
        return outputs


def check_every_kind_of_map(
    entry: Mapping[str, Any], update_of: Callable[[dict[str, Tensor], Any], Tensor], *, noise: float, atol: float
) -> None:
    """Compare an adaptation of all maps of `Mixed`, unfolded and folded, with updates of its weights by hand.

    Args:
        entry: the adaptation without its target.
        update_of: the function that computes the update of a weight, ``[rows, columns]``, from the tensors by part, and
            the adaptation's spec.
        noise: as for `perturb`.
        atol: the tolerance of outputs, in float64.
    """
    torch.manual_seed(0)
    model, x = Mixed().double().requires_grad_(False), torch.randn(3, 4, 5, 7, dtype=torch.float64)
    modules = [path for path, _ in model.named_children()]
    compiled = graftc.compile({"adapt": [{**entry, "target": {"modules": modules}}]}, model, {"x": x}).eval()
    (spec,) = runner_of(compiled).spec.adapt
    assert torch.equal(compiled(x), model(x))
    perturb(compiled, noise)
    tensors, folded = compiled.adapter_state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
    for module in modules:
        own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        weight = folded[f"{module}.weight"]
        weight += update_of(own, spec).reshape(weight.shape)
    check_by_hand(compiled, model, Mixed(), folded, x, least=1e-1, atol=atol)


def check_by_hand(
    compiled: Any,
    model: nn.Module,
    by_hand: nn.Module,
    folded: Mapping[str, Tensor],
    x: Tensor,
    *,
    least: float,
    atol: float,
) -> None:
    """Compare an adapted model, and its merge, with a model whose weights were changed by hand.

    Args:
        compiled: the adapted model.
        model: its source, from which it must differ by more than ``least``.
        by_hand: a model of the same class, which loads the changed weights.
        folded: these weights, in float64.
        x: the input.
        least, atol: the bounds.
    """
    by_hand = by_hand.double()
    by_hand.load_state_dict(folded)
    assert float((model(x) - by_hand(x)).detach().abs().max()) > least
    torch.testing.assert_close(compiled(x), by_hand(x), rtol=0, atol=atol)
    merged = compiled.merge()
    assert merged.certificate.passed
    torch.testing.assert_close(merged(x), by_hand(x), rtol=0, atol=atol)


def update_of_values(compiled: Any) -> Tensor:
    """Return the update of ``attn.v`` in GPT-2's second layer, rows of a fused weight whose others do not change."""
    name = "transformer.h.1.attn.c_attn.weight"
    update = (lazy_tensors(compiled.compilation).exact(name) - compiled.compilation.store.get(name).double()).T
    rows = update.shape[0] // 3
    assert not update[: 2 * rows].any()
    return update[2 * rows :]


def before_and_after(compiled: Any, family: str) -> tuple[Tensor, Tensor]:
    """Return the weight of `DOWN` in the source model, and after folding, ``[out, in]`` in float64."""
    name = f"{DOWN[family]}.weight"
    before = tiny(family).get_parameter(name).detach().double()
    after = lazy_tensors(compiled.compilation).exact(name)
    return (before.T, after.T) if family == "gpt2" else (before, after)


def check_stack(family: str, *entries: Mapping[str, Any]) -> None:
    """Check that adaptations of the same sites start as the base, and fold on top of one another."""
    target = {"role": ["attn.q", "experts" if family == "mixtral" else "ffn.down"]}
    compiled = fresh(family, *({**e, "name": f"a{i}", "target": target} for i, e in enumerate(entries)))
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(tiny(family), inputs))
    perturb(compiled, 0.1)
    merged = compiled.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


def loaded_again(compiled: Any, family: str, folder: Path) -> Any:
    """Save an adapted tiny model and return the loaded one, in eval mode, whose outputs are the same to the bit."""
    compiled.save(folder)
    loaded = graftc.load(folder, tiny(family)).eval()
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    return loaded


def check_packed_base(entry: Mapping[str, Any], noise: float) -> None:
    """Compare an adaptation of packed weights with one of the values that they stand for, to the bit."""
    model = tiny("llama").eval()
    packed = graftc.compile({"adapt": [entry], "base": {"quantize": "nf4"}}, model, seed=0).eval()
    dense = graftc.compile({"adapt": [entry]}, dense_twin(model, quantize="nf4"), seed=0).eval()
    perturb(packed, noise)
    dense.load_adapter_state_dict(packed.adapter_state_dict())
    inputs = inputs_for(packed)
    assert same_bits(outputs_of(packed, inputs), outputs_of(dense, inputs))
