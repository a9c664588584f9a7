"""The names that a merge's certificate gives to tensors that full fine-tuning replaces."""

from __future__ import annotations

import pytest

from graftc.testing import perturb, tiny
from tests.kit.models import fresh


@pytest.mark.slow
def test_rows_of_a_fused_weight_have_the_name_of_their_part() -> None:
    """Queries are some of the rows of GPT-2's ``c_attn``; ``c_fc`` is a whole weight."""
    compiled = fresh(tiny("gpt2"), {"method": "full", "target": {"role": ["attn.q", "ffn.up"], "layers": [0]}})
    perturb(compiled, 0.1)
    changed = {site.site for site in compiled.merge().certificate.sites}
    ends = {"attn.c_attn.weight[q]", "attn.c_attn.bias[q]", "mlp.c_fc.weight", "mlp.c_fc.bias"}
    assert changed == {f"transformer.h.0.{end}" for end in ends}
