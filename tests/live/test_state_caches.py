"""Models whose caches hold states: their own Python calls layers with these, and maps are graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.testing import perturb


def recurrent() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    sizes = {"state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 8}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=50, hidden_size=32, num_hidden_layers=1, **sizes)).eval()


@pytest.mark.slow
def test_it_generates_as_its_merged_class_and_an_adapted_convolution_is_refused() -> None:
    model, ids = recurrent(), torch.randint(3, 50, (2, 6))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for target, refused in (("**.in_proj", False), ("**.conv1d", True)):
        spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": target}}]}
        compiled = graftc.compile(spec, model, {"input_ids": ids}, cache=False).eval()
        perturb(compiled, 0.3)
        if refused:  # in steps its weight is read between graphs, where it would be the base's
            with pytest.raises(graftc.GraftError, match=r"GC031|GC140"):
                compiled.generate(input_ids=ids, **options)
            continue
        wanted = compiled.merge().to_transformers().eval().generate(input_ids=ids, **options)
        assert torch.equal(compiled.generate(input_ids=ids, **options), wanted)
        assert not torch.equal(model.generate(input_ids=ids, **options), wanted)
