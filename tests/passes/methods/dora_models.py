"""Models with DoRA, and its formula written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from tests.kit.comparing import floats

ROLES = ["attn.q", "attn.v", "ffn.down"]
DORA = {"method": "dora", "target": {"role": ROLES}, "rank": 4, "alpha": 6}


def roles_of(family: str) -> list[str]:
    """Return the roles to adapt; all of Mixtral's feed-forward layers are experts."""
    return ["attn.q", "attn.v", "experts"] if family == "mixtral" else ROLES


def exact(compiled: Any, name: str) -> Tensor:
    """A folded base tensor in float64, before rounding."""
    folded: Tensor = lazy_tensors(compiled.compilation).exact(name)
    return folded


def written_out(weight: Tensor, own: Mapping[str, Tensor], scaling: float, detached: bool) -> Tensor:
    """Return ``m V / |V|``, the formula of the paper."""
    direction = weight + scaling * own["B"] @ own["A"] if "A" in own else weight
    norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return own["m"].unsqueeze(-1) * direction / (norm.detach() if detached else norm)


def reference(
    compiled: Any, model: nn.Module, tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]
) -> list[Tensor]:
    """The outputs of the source model with every adapted weight written out, differentiable in ``tensors``."""
    compilation = compiled.compilation
    weights: dict[str, Tensor] = {}
    for resolved in compilation.main.resolved:
        for site, spec in resolved.places:
            names = compilation.parts[resolved.name][site.key]
            own = {part: tensors[name] for part, name in names.items()}
            name = site.own.tensor
            stored = weights.get(name, model.get_parameter(name).detach())
            rows = written_out(site.own.operand(stored), own, spec.scaling, spec.norm_gradient == "detached")
            weights[name] = site.own.put_operand(stored, rows)
    outputs = torch.func.functional_call(model, weights, kwargs=dict(inputs))
    return floats(outputs)


def losses(leaves: list[Tensor]) -> Tensor:
    """A randomly weighted sum of all outputs, as a scalar."""
    generator = torch.Generator().manual_seed(3)
    return sum(((leaf * torch.randn(leaf.shape, generator=generator)).sum() for leaf in leaves), torch.zeros(()))


class Line(nn.Module):
    """A model that is a single linear map."""

    def __init__(self, into: int = 8, out: int = 6, dtype: torch.dtype = torch.float32, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(into, out, dtype=dtype, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in]`` to ``[batch, out]``."""
        return self.map(x)


def on_line(line: Line, **fields: Any) -> Any:
    """Compile ``line`` with DoRA on its map."""
    spec = {"adapt": [{"method": "dora", "target": {"modules": "map"}, **fields}]}
    return graftc.compile(spec, line, {"x": torch.ones(2, line.map.in_features, dtype=line.map.weight.dtype)})
