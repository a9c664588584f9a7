"""``untie``: a tensor that several modules share becomes the named module's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import graftc
from graftc.runtime.sources.models import load_model
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.folders import saved_base
from tests.kit.models import fresh

HEAD = [{"name": "head", "method": "lora", "target": {"modules": "lm_head"}, "rank": 4}]
TABLES = {"gpt2": "transformer.wte.weight", "t5": "shared.weight"}


def untied(family: str, **changes: Any) -> tuple[Any, Any]:
    """Return a tiny model, and one with an adapted head of its own."""
    model = tiny(family)
    return model, fresh(model, **{"adapt": HEAD, "untie": ["lm_head"], **changes})


@pytest.mark.full
@pytest.mark.parametrize("family", TABLES)
def test_a_head_of_its_own_folds(family: str, tmp_path: Path) -> None:
    """It starts as the identity; the folded class keeps the table and has another head, also when reloaded."""
    model, compiled = untied(family)
    inputs = inputs_for(compiled, (2, 5))
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    table = model.get_input_embeddings().weight
    before = table.clone()
    perturb(compiled)
    unfolded = outputs_of(compiled, inputs)
    assert largest_difference(unfolded, outputs_of(model, inputs)) > 1e-2
    merged = compiled.merge()
    assert merged.certificate.passed
    merged.save(tmp_path / "folded")
    loaded: Any = load_model(str(tmp_path / "folded"))
    assert largest_difference(outputs_of(loaded, inputs), unfolded) <= 2e-5
    assert torch.equal(loaded.get_input_embeddings().weight, before) and torch.equal(table, before)
    assert not torch.equal(loaded.lm_head.weight, before)
    assert model.lm_head.weight is model.get_input_embeddings().weight and model.config.tie_word_embeddings


@pytest.mark.slow
def test_untying_takes_no_memory() -> None:
    model, compiled = untied("gpt2")
    store = compiled.compilation.store
    assert store.tied("lm_head.weight") == ()
    assert store.get("lm_head.weight").data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.slow
def test_without_it_the_head_does_not_fold() -> None:
    with pytest.warns(graftc.GraftWarning, match="GC024"):
        _, compiled = untied("gpt2", untie=[])
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC022"


@pytest.mark.slow
def test_a_head_that_trains_in_full() -> None:
    """``train`` refuses a tied tensor, and accepts an untied one."""
    _, compiled = untied("gpt2", adapt=[{**HEAD[0], "target": {"role": "attn.q"}}], train=["lm_head"])
    assert "lm_head.graftc.trained.weight" in compiled.adapter_state_dict()
    perturb(compiled)
    merged = compiled.merge().to_transformers()
    assert not torch.equal(merged.lm_head.weight, merged.transformer.wte.weight)


@pytest.mark.slow
def test_what_stays_unfolded_stays_apart(tmp_path: Path) -> None:
    """If untied and not adapted, the merged model has two equal tensors instead of one."""
    _, compiled = untied("gpt2", adapt=[{**HEAD[0], "target": {"role": "attn.q"}}])
    compiled.merge(allow_unchanged=True).save(tmp_path / "it")
    loaded: Any = load_model(str(tmp_path / "it"))
    head, table = loaded.lm_head.weight, loaded.transformer.wte.weight
    assert torch.equal(head, table) and head.data_ptr() != table.data_ptr()


@pytest.mark.full
def test_with_new_tokens() -> None:
    model, compiled = untied("gpt2", tokens={"add": ["<a>"]})
    perturb(compiled)
    merged = compiled.merge().to_transformers()
    assert merged.lm_head.weight.shape == merged.transformer.wte.weight.shape == (102, 48)
    assert not torch.equal(merged.lm_head.weight[:101], merged.transformer.wte.weight[:101])
    assert torch.equal(merged.transformer.wte.weight[:101], model.transformer.wte.weight)


@pytest.mark.full
def test_it_is_kept_in_an_artifact(tmp_path: Path) -> None:
    base = load_model(str(saved_base(tmp_path / "base", "gpt2")))
    compiled = graftc.compile({"adapt": HEAD, "untie": ["lm_head"]}, base).eval()
    perturb(compiled)
    compiled.save(tmp_path / "it")
    loaded = graftc.load(tmp_path / "it").eval()
    inputs = inputs_for(compiled, (2, 5))
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))


class Asking(transformers.GPT2LMHeadModel):
    """A model that is taken apart, because it reads a value."""

    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        return super().forward(-input_ids if bool((input_ids < 0).all()) else input_ids, **inputs)


@pytest.mark.slow
def test_it_is_kept_in_an_artifact_of_layers(tmp_path: Path) -> None:
    base = Asking(tiny("gpt2").config).eval()
    compiled = graftc.compile({"adapt": HEAD, "untie": ["lm_head"]}, base).eval()
    perturb(compiled)
    compiled.save(tmp_path / "it")
    loaded = graftc.load(tmp_path / "it", base).eval()
    ids = torch.tensor([[3, 7, 5]])
    assert same_bits(loaded(input_ids=ids).logits, compiled(input_ids=ids).logits)


def test_a_class_that_asks_whether_it_is_tied() -> None:
    """Switch Transformers scale the input of a tied head: untied, the class would compute something else."""
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    sizes = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_heads": 4, "num_experts": 2, "vocab_size": 101}
    config = SwitchTransformersConfig(**sizes, num_layers=2, num_decoder_layers=2, decoder_start_token_id=0)
    model = SwitchTransformersForConditionalGeneration(config).eval()
    with pytest.raises(GraftError) as caught:
        graftc.compile({"adapt": HEAD, "untie": ["lm_head"]}, model)
    assert caught.value.code == "GC028" and model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("untie", "code", "words"),
    [
        (["lm_head", "transformer.h.0"], "GC027", "no parameter in transformer.h.0 is tied"),
        (["lm_head", "lm_haed"], "GC011", "untie 'lm_haed' matches none"),
        (["lm_head", "lm_{head,haed}"], "GC011", "untie 'lm_haed' of 'lm_{head,haed}' matches none"),
    ],
)
def test_what_cannot_be_untied(untie: list[str], code: str, words: str) -> None:
    with pytest.raises(GraftError, match=words) as caught:
        untied("gpt2", untie=untie)
    assert caught.value.code == code
    assert caught.value.place is not None and caught.value.place.path == "untie[1]"
