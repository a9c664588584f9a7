"""The methods of the matrix, each as a spec for SmolLM2, with the noise that stands in for its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MAPS = {"role": ["attn.q", "attn.v", "ffn.down"]}


@dataclass(frozen=True)
class Case:
    """A row of the matrix.

    Attributes:
        title: what it is called on the page.
        spec: the spec.
        noise: the standard deviation of the noise that is added to everything that trains: enough for other tokens.
    """

    title: str
    spec: dict[str, Any]
    noise: float = 0.05


def _alone(method: str, noise: float = 0.05, title: str = "", **fields: Any) -> Case:
    return Case(title or method, {"adapt": [{"method": method, **fields}]}, noise)


CASES: dict[str, Case] = {
    "lora": _alone("lora", title="LoRA", rank=8, target=_MAPS),
    "rslora": _alone("lora", title="rsLoRA", rank=8, rslora=True, target=_MAPS),
    "pissa": _alone("lora", title="PiSSA", rank=8, init="pissa", target=_MAPS),
    "dora": _alone("dora", title="DoRA", rank=8, target=_MAPS),
    "adalora": _alone("adalora", 0.2, title="AdaLoRA", target=_MAPS),
    "ia3": _alone("ia3", title="(IA)³"),
    "loha": _alone("loha", 0.2, title="LoHa", rank=4, target=_MAPS),
    "vera": _alone("vera", 0.5, title="VeRA", rank=64, target={"role": ["attn.q", "attn.v"]}),
    "bottleneck": _alone("houlsby", title="bottleneck (Houlsby)"),
    "prefix": _alone("prefix", title="prefix", length=5),
    "prompt": _alone("prompt", title="prompt", length=5),
    "rows": _alone(
        "rows", title="trained rows (tokens)", rows=[28, 216, 253, 284, 655], target={"modules": "model.embed_tokens"}
    ),
    "head": Case("trained head", {"adapt": [], "train": ["lm_head"], "untie": "lm_head"}),
    "bitfit": _alone("bitfit", title="BitFit (biases added)", add_missing=True),
    "spiel": _alone("spiel", title="SpIEL", target=_MAPS),
}
"""The rows of the matrix, by key."""

PROMPTS = (
    "Once upon a time there",
    "The capital of France is",
    "She opened the door and",
    "Water boils at a temperature",
    "My favourite colour is the",
)
"""Texts of five tokens each, so that torch takes them as one batch without padding."""
TOKENS = 32
"""The number of tokens that are generated from each prompt."""
