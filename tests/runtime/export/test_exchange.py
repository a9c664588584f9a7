"""A graph with adaptations as inputs computes what the model computes whose tensors it is given, or the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.runtime.export.job import ExportJob
from graftc.runtime.export.module import ExportModule
from graftc.runtime.model.runner import runner_of
from graftc.testing import largest_difference, outputs_of
from graftc.testing.compare import SHAPES, inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted

LINEAR = {"role": ["attn.q", "ffn.down"]}
SPECS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "lora": (
        "gpt2",
        [
            {"method": "lora", "rank": 3, "alpha": 7, "target": LINEAR},
            {"method": "lora", "rank": 8, "rslora": True, "target": {"role": "attn.q"}, "name": "wide"},
        ],
    ),
    "ranks": (
        "llama",
        [
            {
                **{"method": "lora", "rank": 2, "target": LINEAR, "bias": "lora_only"},
                "overrides": [{"role": "attn.q", "rank": 5}],
            }
        ],
    ),
    "embedding": ("gpt2", [{"method": "lora", "rank": 3, "target": {"role": "embed"}}]),
    "pissa": ("bert", [{"method": "lora", "rank": 3, "init": "pissa", "bias": "all", "target": LINEAR}]),
    "adalora": ("bert", [{"method": "adalora", "target": LINEAR}]),
    "dylora": ("llama", [{"method": "dylora", "rank": 6, "target": LINEAR}]),
    "sora": ("llama", [{"method": "sora", "rank": 6, "target": LINEAR}]),
    "adamix_lora": ("bert", [{"method": "adamix_lora", "rank": 3, "target": LINEAR}]),
    "dora": (
        "gpt2",
        [{"method": "dora", "rank": 3, "target": LINEAR, "overrides": [{"role": "attn.q", "direction": False}]}],
    ),
    "ia3": ("bert", [{"method": "ia3"}]),
    "boft": ("gpt2", [{"method": "boft", "factors": 2, "target": LINEAR}]),
    "oft": ("bert", [{"method": "oft", "block_size": 8, "cayley": "exact", "target": LINEAR}]),
    "bottleneck": ("bert", [{"method": "bottleneck", "bottleneck": 5, "scale": 0.7, "activation": "gelu"}]),
    "learned": (
        "llama",
        [{"method": "bottleneck", "bottleneck": 5, "scale": "learned", "norm": "both", "bias": False}],
    ),
    "pfeiffer": ("llama", [{"method": "pfeiffer", "init": "bert"}]),
    "he_parallel": ("llama", [{"method": "he_parallel"}]),
    "adamix": ("bert", [{"method": "adamix"}]),
    "prefix": ("llama", [{"method": "prefix", "length": 3}]),
    "network": ("bert", [{"method": "prefix", "length": 3, "reparameterization": {"hidden": 8}}]),
    "shifted": ("gpt2", [{"method": "prefix", "length": 3, "positions": "shifted", "window": "masked"}]),
    "two prefixes": (
        "gpt2",
        [{"method": "prefix", "length": 3}, {"method": "p_tuning_v2", "length": 2, "positions": "shifted"}],
    ),
    "window": ("mixtral", [{"method": "prefix", "length": 3, "window": "masked"}]),
    "relative": ("t5", [{"method": "prefix", "length": 3}]),
    "all": (
        "llama",
        [
            {"method": "lora", "rank": 3, "target": LINEAR},
            {"method": "dora", "rank": 2, "target": {"role": "attn.k"}},
            {"method": "bottleneck", "bottleneck": 5},
            {"method": "ia3", "target": {"role": "attn.v"}},
            {"method": "prefix", "length": 3},
        ],
    ),
}
QUICK = {"lora", "dora", "learned", "shifted"}
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in SPECS]


def exported(compiled: Any, *names: str) -> ExportModule:
    """Return a model's graph with adaptations as inputs."""
    return ExportJob(runner_of(compiled).complete(), {"inputs": names}).graph()


def flat(outputs: dict[str, Tensor]) -> list[Tensor]:
    return list(outputs.values())


@pytest.mark.sample("dora", "lora")
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_method(case: str) -> None:
    """A graph gives the model's own outputs, those of another model of other sizes, and by default the base's."""
    family, adapt = SPECS[case]
    compiled = adapted(family, *adapt, noise=0.2)
    names = list(compiled.spec.owners)
    module = exported(compiled, *names)
    model = tiny(family).eval()
    with torch.no_grad():
        for sizes in SHAPES:
            inputs = inputs_for(compiled, sizes, front=False)
            given = module._as_input(module.values)
            assert largest_difference(flat(module.module(**inputs, **given)), outputs_of(compiled, inputs)) <= 1e-5
            first = module.outputs[0]
            base = module.module(**inputs, **module._as_input({**module.tensors, **module.defaults}))
            assert largest_difference([base[first]], [model(**inputs)[first]]) <= 1e-6
            assert largest_difference([base[first]], outputs_of(compiled, inputs)[:1]) > 1e-3
