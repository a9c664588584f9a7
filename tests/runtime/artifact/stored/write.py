"""Write artifacts that are kept in the repository, each with inputs and its outputs for them.

``python -m tests.runtime.artifact.stored.write`` writes those of `STORED`, and bases, that do not exist yet. It is only
for adding new ones: existing ones were written by earlier versions, have to load for as long as their format is
supported, and are never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing import outputs_of, perturb, tiny
from graftc.testing.compare import inputs_for

HERE = Path(__file__).parent
BASES = HERE / "bases"
"""Weights of the bases, by family: what is drawn from a seed is other numbers on another processor."""


@dataclass(frozen=True)
class Stored:
    """An artifact in the repository: `tiny` of a family with one layer and seed 0, adapted and perturbed.

    Attributes:
        family: the family of its base.
        spec: the spec that it was compiled from.
        folds: whether merging works.
        more: further inputs of the call whose outputs are kept.
    """

    family: str
    spec: Mapping[str, Any]
    folds: bool = True
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def base(self) -> nn.Module:
        """Return the base, the same at every call and on every machine."""
        model = tiny(self.family, layers=1)
        load_model(model, BASES / f"{self.family}.safetensors")
        return model


def _one(method: str, **fields: Any) -> dict[str, Any]:
    return {"adapt": [{"method": method, **fields}]}


def _bank() -> dict[str, Any]:
    members = [
        {"name": name, "method": "lora", "target": {"role": ["attn.q", "ffn.up"]}, "rank": 2} for name in ("a", "b")
    ]
    return {"adapt": members, "compose": {"bank": ["a", "b"]}}


QUERIES = {"role": ["attn.q", "ffn.down"]}

STORED: Mapping[str, Stored] = {
    "adalora_roberta": Stored("roberta", _one("adalora", target=QUERIES, rank=3, target_rank=2)),
    "bank_bert": Stored("bert", _bank(), folds=False, more={"adapter_ids": torch.tensor([1, 0, 1])}),
    "diff_pruning_bert": Stored("bert", _one("diff_pruning", target=QUERIES)),
    "dora_llama": Stored("llama", _one("dora", target=QUERIES, rank=2)),
    "houlsby_bert": Stored("bert", _one("houlsby", bottleneck=4), folds=False),
    "ia3_t5": Stored("t5", _one("ia3", target={"role": ["cross.attn.v", "ffn.down"]})),
    "lora_head_bert": Stored(
        "bert", {**_one("lora", target=QUERIES, rank=2, dropout=0.1, bias="lora_only"), "train": ["classifier"]}
    ),
    "new_tokens_llama": Stored(
        "llama", {**_one("lora", target=QUERIES, rank=2), "tokens": {"add": ["<one>", "<two>"]}}
    ),
    "prefix_gpt2": Stored("gpt2", _one("prefix", length=3, reparameterization={"hidden": 6}), folds=False),
    "prompt_bert": Stored("bert", _one("prompt", length=3), folds=False),
}
"""The artifacts by name."""


def artifact_of(name: str) -> Path:
    """Return the artifact's folder."""
    return HERE / name / "artifact"


def kept_call(name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the inputs that are kept beside an artifact, and the outputs of its eval graph for them."""
    kept = load_file(HERE / name / "outputs.safetensors")
    inputs = {key.removeprefix("input."): tensor for key, tensor in kept.items() if key.startswith("input.")}
    outputs = sorted(key for key in kept if key.startswith("output."))
    return inputs, [kept[key] for key in outputs]


def write(name: str) -> None:
    """Write one artifact that does not exist yet, and its outputs."""
    stored = STORED[name]
    compiled: Compiled = graftc.compile(stored.spec, stored.base()).eval()
    perturb(compiled)
    inputs = {**inputs_for(compiled, (3, 7)), **stored.more}
    kept = {f"input.{key}": tensor.contiguous() for key, tensor in inputs.items()}
    kept |= {f"output.{at:02}": tensor.contiguous() for at, tensor in enumerate(outputs_of(compiled, inputs))}
    (HERE / name).mkdir()
    compiled.save(artifact_of(name))
    save_file(kept, HERE / name / "outputs.safetensors")


def main() -> None:
    """Add what is missing."""
    BASES.mkdir(exist_ok=True)
    for family in {stored.family for stored in STORED.values()}:
        if not (file := BASES / f"{family}.safetensors").exists():
            save_model(tiny(family, layers=1), str(file))
    for name in STORED:
        folder = HERE / name
        if folder.exists():
            print(f"{name}: is there and stays as it is")
            continue
        write(name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: written, {size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
