"""Models whose code is in their folder train, merge, save and load as those of transformers do."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc

CODE = Path(__file__).parent / "remote"
AUTO = {
    "looping": ("AutoModelForCausalLM", "modeling_looping", "LoopingConfig", "LoopingForCausalLM"),
    "routed": (
        "AutoModelForSequenceClassification",
        "modeling_routed",
        "RoutedConfig",
        "RoutedForSequenceClassification",
    ),
}
MAPS = {"looping": "**.{q_proj,v_proj,patches}", "routed": "**.{up,down,router}"}


def folder_of(name: str, where: Path) -> Path:
    """Create a folder with a config, code and weights, as on a hub."""
    import transformers

    auto, file, config, model = AUTO[name]
    where.mkdir()
    shutil.copy(CODE / f"{file}.py", where)
    links = {"AutoConfig": f"{file}.{config}", auto: f"{file}.{model}"}
    (where / "config.json").write_text(json.dumps({"model_type": name, "auto_map": links, "num_labels": 3}))
    torch.manual_seed(0)
    settings = transformers.AutoConfig.from_pretrained(where, trust_remote_code=True)
    getattr(transformers, auto).from_config(settings, trust_remote_code=True).save_pretrained(where)
    return where


def loaded(name: str, where: Path) -> Any:
    import transformers

    return getattr(transformers, AUTO[name][0]).from_pretrained(where, trust_remote_code=True).eval()


def batch_of(name: str, seed: int, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (rows, length), generator=generator)
    if name == "routed":
        return {"input_ids": ids, "labels": torch.arange(rows) % 3}
    counts = torch.tensor([2, 3])
    ids[0, 1:3] = ids[1, 2:5] = 50
    pixels = torch.randn(int(counts.sum()), 12, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels, "counts": counts, "labels": ids.masked_fill(ids == 50, -100)}


@pytest.mark.sample("routed")
@pytest.mark.full
@pytest.mark.parametrize("name", list(AUTO))
def test_it_trains_merges_saves_and_loads(name: str, tmp_path: Path) -> None:
    base = folder_of(name, tmp_path / "base")
    model = loaded(name, base)
    first, second = batch_of(name, 0), batch_of(name, 1, rows=5, length=12)
    spec = {"adapt": [{"method": "lora", "rank": 3, "target": {"modules": MAPS[name]}}]}
    compiled = graftc.compile(spec, model, first, cache=False)
    source = copy.deepcopy(model)
    for batch in (first, second):
        with torch.no_grad():
            assert torch.equal(compiled(**batch).logits, source(**batch).logits)
    optimiser = torch.optim.AdamW([p for p in compiled.train().parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = compiled(**first).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    compiled.eval()
    merged = compiled.merge()
    merged.to_transformers().save_pretrained(tmp_path / "merged")
    compiled.save(tmp_path / "artifact")
    again = graftc.load(tmp_path / "artifact", loaded(name, base)).eval()
    plain = loaded(name, tmp_path / "merged")
    for batch in (first, second):
        with torch.no_grad():
            wanted = compiled(**batch).logits
            assert torch.equal(again(**batch).logits, wanted)
            assert torch.allclose(merged(**batch).logits, wanted, atol=1e-4)
            assert torch.allclose(plain(**batch).logits, wanted, atol=1e-4)
