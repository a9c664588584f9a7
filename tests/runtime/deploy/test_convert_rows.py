"""Trained rows and vectors as LoRA: one factor selects rows, so that nothing is lost; PEFT computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from graftc.runtime.deploy.low_rank import Decomposition
from graftc.runtime.model.runner import runner_of
from graftc.testing import largest_difference, outputs_of, tiny
from graftc.testing.compare import inputs_for
from tests.kit.models import adapted

ROWS = {"method": "rows", "rows": [3, 7, 50], "target": {"role": "embed"}}


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (2, 5, 9)])
def test_one_factor_selects(shape: tuple[int, ...]) -> None:
    """An update with few columns, or of full rank, is kept as it is; only ranks below that take singular values."""
    update = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if update.dim() == 2 and shape[1] > shape[0]:
        update[:, [i for i in range(shape[1]) if i not in (4, 9, 30)]] = 0
    made = Decomposition(update)
    factors = made.factors(made.rank())
    assert torch.equal(factors.update, update)
    one_hot = [f for f in (factors.down, factors.up) if set(f.unique().tolist()) == {0.0, 1.0}]
    assert one_hot and made.rank() == min(int(update.ne(0).flatten(0, -2).any(0).sum()), min(update.shape[-2:]))
    lower = made.factors(made.rank() - 1)
    s = torch.linalg.svdvals(update)
    assert float((lower.update - update).norm()) == pytest.approx(float(s[..., made.rank() - 1 :].norm()), rel=1e-9)


def test_an_update_of_zeros() -> None:
    made = Decomposition(torch.zeros(4, 7, dtype=torch.float64))
    assert made.rank() == 1 and not made.factors(1).update.any()


def read_by_peft(compiled: Any, family: str, folder: Path, inputs: Any, **changes: Any) -> Any:
    runner_of(compiled).export(folder, format="peft")
    model = PeftModel.from_pretrained(tiny(family, **changes), folder).eval()
    with torch.no_grad():
        return [model(**inputs).logits]


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "changes", "tied"),
    [("llama", {}, False), ("llama", {"tie_word_embeddings": True}, True), ("gpt2", {}, True)],
)
def test_trained_tokens(family: str, changes: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    """Each trained token takes one rank; where the head is tied to the table, both have the same update."""
    compiled = adapted(tiny(family, **changes), ROWS)
    converted = runner_of(compiled).convert()
    assert {site.rank for site in converted.sites} == {3} and len(converted.sites) == 1 + tied
    assert converted.largest_error < 1e-7 and converted.largest_difference < 2e-6
    factors = converted.compiled.adapter_state_dict()
    down = next(t for n, t in factors.items() if n.endswith(("embed_tokens.graftc.rows.A", "wte.graftc.rows.A")))
    assert down.nonzero().tolist() == [[0, 3], [1, 7], [2, 50]] and set(down.unique().tolist()) == {0.0, 1.0}
    inputs = inputs_for(compiled, (2, 5))
    inputs["input_ids"][:, 1:4] = torch.tensor([3, 7, 50])
    before = outputs_of(compiled, inputs)
    found = read_by_peft(converted.compiled, family, tmp_path / "peft", inputs, **changes)
    assert largest_difference(found, before[:1]) < 1e-5
    with runner_of(compiled).disabled():
        assert largest_difference(outputs_of(compiled, inputs), before) > 1e-2


@pytest.mark.full
def test_vectors_need_full_rank(tmp_path: Path) -> None:
    """(IA)^3 scales every row or column: exact only at the full rank, which the result states."""
    compiled = adapted("llama", {"method": "ia3"})
    converted = runner_of(compiled).convert()
    sizes = {
        str(s.key): min(s.in_features, s.out_features) for s, _ in compiled._graftc.compilation.main.resolved[0].places
    }
    assert {site.site: (site.rank, site.full_rank) for site in converted.sites} == {n: (s, s) for n, s in sizes.items()}
    assert converted.largest_error < 1e-7
    inputs = inputs_for(compiled, (2, 5))
    found = read_by_peft(converted.compiled, "llama", tmp_path / "peft", inputs)
    assert largest_difference(found, outputs_of(compiled, inputs)[:1]) < 1e-5
