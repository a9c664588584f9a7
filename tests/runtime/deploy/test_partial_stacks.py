"""Folding adaptations below one that stays: DoRA's norms are those of the weight as adapted so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.deploy.merged import fold
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny

BELOW: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3},
    "ia3": {"method": "ia3"},
    "loha": {"method": "loha", "rank": 3},
    "vera": {"method": "vera", "rank": 5},
    "oft": {"method": "oft", "block_size": 4},
    "boft": {"method": "boft", "factors": 2},
    "dora": {"method": "dora", "rank": 2},
    "bitfit": {"method": "bitfit", "add_missing": True},
}
STACKS = (
    ("llama", ("lora",), 1),
    ("llama", ("bitfit",), 1),
    ("gpt2", ("ia3",), 1),
    ("gpt2", ("lora", "ia3"), 1),
    ("gpt2", ("lora", "ia3"), 2),
    ("llama", ("bitfit", "ia3"), 2),
    ("llama", ("ia3", "bitfit"), 1),
    ("llama", ("loha", "bitfit"), 2),
    ("gpt2", ("vera", "dora"), 1),
    ("gpt2", ("lora", "oft"), 2),
    ("gpt2", ("boft", "ia3"), 2),
    ("mixtral", ("lora",), 1),
)


def stacked(family: str, names: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Any:
    """A perturbed model with adaptations ``a0``, ``a1`` ... of some maps, and a DoRA on top."""
    target = {"role": ["attn.q", "ffn.down"] if family != "mixtral" else ["attn.q", "experts"]}
    entries = [{**BELOW[name], "name": f"a{index}", "target": target} for index, name in enumerate(names)]
    top = {"method": "dora", "rank": 4, "name": "top", "target": target}
    compiled = graftc.compile({"adapt": [*entries, top]}, tiny(family).to(dtype)).eval()
    perturb(compiled)
    return compiled


@pytest.mark.slow
@pytest.mark.sample("llama-bitfit+ia3-2")
@pytest.mark.parametrize(
    ("family", "names", "count"), STACKS, ids=lambda value: "+".join(value) if isinstance(value, tuple) else None
)
def test_those_below_fold(family: str, names: tuple[str, ...], count: int) -> None:
    compiled = stacked(family, names)
    chosen = [f"a{index}" for index in range(count)]
    merged = fold(runner_of(compiled), only=chosen)
    assert merged.certificate.passed and merged.folded == tuple(chosen) and "top" in merged.kept
    inputs = inputs_for(compiled)
    expected = outputs_of(compiled, inputs)
    assert largest_difference(outputs_of(merged, inputs), expected) <= 5e-5
    if "bitfit" in names[:count]:  # the class has no place for a bias
        with pytest.raises(GraftError) as caught:
            compiled.merge_partially(only=chosen)
        assert caught.value.code == "GC052"
    else:
        rest = compiled.merge_partially(only=chosen).compiled
        assert largest_difference(outputs_of(rest, inputs), expected) <= 5e-5
    base = outputs_of(compiled.compilation.source, inputs)
    assert largest_difference(base, expected) > 1e-2


@pytest.mark.full
@pytest.mark.slow
def test_in_sixteen_bits() -> None:
    partial = stacked("llama", ("lora",), torch.bfloat16).merge_partially(only=["a0"])
    assert partial.certificate.passed


@pytest.mark.slow
def test_the_rest_is_saved(tmp_path: Path) -> None:
    compiled = stacked("llama", ("lora", "ia3"))
    partial = compiled.merge_partially(only=["a0", "a1"])
    partial.save(tmp_path / "artifact")
    inputs = inputs_for(compiled)
    loaded = graftc.load(tmp_path / "artifact").eval()
    assert largest_difference(outputs_of(loaded, inputs), outputs_of(compiled, inputs)) <= 5e-5
