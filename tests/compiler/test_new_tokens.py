"""New tokens: rows that train in the table and in the head, beside an unchanged base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.deployment import check_onnx
from graftc.testing.families import tiny
from tests.kit.copies import fold_other_copies
from tests.kit.models import adapted, fresh
from tests.kit.refusals import refused
from tests.kit.specs import lora

NEW = ["<one>", "<two>", "<three>"]
TIED = {"gpt2": True, "llama": False}
ONE_QUICK = ["gpt2", "llama"]
QUERIES, EVERY = lora("attn.q"), lora(modules="**", rank=1)


def entries_of(model: Any) -> int:
    """Return the number of entries of the table."""
    return int(model.get_input_embeddings().weight.shape[0])


def numbers(entries: int, *, new: bool) -> Tensor:
    """Return token numbers of two texts, with or without some new ones among them."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, entries, (2, 8), generator=generator)
    if new:
        drawn[:, 2], drawn[0, 5], drawn[1, 4] = entries, entries + 2, entries + 1
    return drawn


@pytest.mark.full
@pytest.mark.parametrize("family", ONE_QUICK)
def test_old_tokens_stay(family: str) -> None:
    """On old tokens, the old columns of the logits are bit-identical to the base's, and the new ones follow them."""
    model: Any = tiny(family)
    entries = entries_of(model)
    compiled = fresh(model, QUERIES, tokens={"add": NEW})
    inputs = {"input_ids": numbers(entries, new=False)}
    (logits,), (base,) = outputs_of(compiled, inputs), outputs_of(model, inputs)
    assert logits.shape[-1] == entries + 3
    assert torch.equal(logits[..., :entries], base)
    assert compiled.config.vocab_size == entries + 3


@pytest.mark.slow
@pytest.mark.sample("gpt2")
@pytest.mark.parametrize("family", TIED)
def test_the_source_is_left_alone(family: str) -> None:
    """The source keeps its table, its handles, its values and its config; unchanged tensors share its storage."""
    model: Any = tiny(family)
    entries = entries_of(model)
    before = {n: (id(t), t.data_ptr(), t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    state = torch.random.get_rng_state()
    compiled = fresh(model, QUERIES, tokens={"add": NEW})
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert (id(tensor), tensor.data_ptr()) == before[name][:2]
        assert torch.equal(tensor, before[name][2])
    assert entries_of(model) == entries == model.config.vocab_size
    shared = [n for n, (_, at, t) in before.items() if t.shape[0] != entries]
    assert shared
    assert all(compiled.compilation.store.get(n).data_ptr() == before[n][1] for n in shared)


@pytest.mark.full
@pytest.mark.parametrize("family", TIED)
def test_one_set_of_rows_where_tied(family: str) -> None:
    """A tied table and head read one set of new rows; otherwise each has its own."""
    model: Any = tiny(family)
    compiled = fresh(model, QUERIES, tokens={"add": NEW})
    rows = {n: t for n, t in compiled.adapter_state_dict().items() if ".graftc.tokens." in n}
    width = model.get_input_embeddings().weight.shape[1]
    assert [tuple(t.shape) for t in rows.values()] == [(3, width)] * (1 if TIED[family] else 2)
    mean = model.get_input_embeddings().weight.mean(0)
    assert torch.allclose(next(iter(rows.values())), mean.expand(3, -1), atol=1e-6)
    entry = compiled.report.adaptations[0]
    assert (entry.name, entry.sites) == ("tokens", len(rows))
    assert entry.trainable_parameters == 3 * width * len(rows)


@pytest.mark.full
@pytest.mark.parametrize("family", ONE_QUICK)
def test_only_new_rows_train(family: str) -> None:
    """New rows get gradients from new tokens; the base's table gets none and stays unchanged."""
    model: Any = tiny(family)
    compiled = fresh(model, QUERIES, tokens={"add": NEW}).train()
    table = next(
        n for n, _ in model.named_parameters() if model.get_parameter(n) is model.get_input_embeddings().weight
    )
    before = compiled.compilation.store.get(table).clone()
    trainable = {n: p for n, p in compiled.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trainable.values(), lr=0.1, weight_decay=0.5)
    inputs = {"input_ids": numbers(entries_of(model), new=True)}
    compiled(**inputs, labels=inputs["input_ids"]).loss.backward()
    new = [p for n, p in trainable.items() if ".graftc.tokens." in n]
    assert all(bool((p.grad.abs().sum(1) > 0).all()) for p in new)
    optimiser.step()
    assert torch.equal(compiled.compilation.store.get(table), before)


@pytest.mark.full
@pytest.mark.sample("llama")
@pytest.mark.slow
@pytest.mark.parametrize("family", TIED)
def test_fold(family: str, tmp_path: Path) -> None:
    """Folded equals unfolded, also in plain transformers after saving and loading, and in ONNX Runtime."""
    model: Any = tiny(family)
    entries = entries_of(model)
    compiled = fresh(model, QUERIES, tokens={"add": NEW})
    perturb(compiled, 0.1)
    inputs = {"input_ids": numbers(entries, new=True)}
    unfolded = outputs_of(compiled, inputs)
    merged = compiled.merge()
    assert merged.certificate.passed
    assert {name for site in merged.certificate.sites for name in site.adaptations} == {"tokens", "lora"}
    merged.to_transformers().save_pretrained(tmp_path / "folded")
    loaded = type(model).from_pretrained(tmp_path / "folded")
    assert entries_of(loaded) == entries + 3
    for folded in (merged, loaded):
        assert largest_difference(outputs_of(folded, inputs), unfolded) <= 2e-5
    for name, runner in {"unfolded": compiled, "folded": merged}.items():
        path = runner.export(tmp_path / f"{name}.onnx")
        check_onnx(path, compiled, (3, 9), 1e-4)


@pytest.mark.full
def test_a_wrong_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """If two new rows are exchanged while folding, the certificate fails."""
    compiled = fresh("llama", QUERIES, tokens={"add": NEW})
    perturb(compiled, 0.1)
    fold_other_copies(monkeypatch, lambda copy: copy.flip(0))
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC051"
    assert any("embed_tokens" in reason for reason in caught.value.details)


@pytest.mark.full
def test_spare_rows() -> None:
    """With ``first``, spare rows of a padded table are trained, and nothing is resized."""
    model: Any = tiny("llama")
    compiled = fresh(model, QUERIES, tokens={"add": NEW, "first": 90})
    inputs = {"input_ids": numbers(90, new=True)}
    (logits,), (base,) = outputs_of(compiled, inputs), outputs_of(model, inputs)
    others = [n for n in range(base.shape[-1]) if n not in (90, 91, 92)]
    assert torch.equal(logits[..., others], base[..., others])
    assert largest_difference([logits], [base]) <= 1e-5, "a product of three columns may round in another way"
    perturb(compiled, 0.1)
    state = compiled.merge().folded_state_dict()
    changed = (state["model.embed_tokens.weight"] != model.get_input_embeddings().weight).any(1)
    assert changed.nonzero().flatten().tolist() == [90, 91, 92]


@pytest.mark.full
def test_with_lora_on_the_table() -> None:
    """New rows and a low-rank update of the whole table fold one after the other."""
    model: Any = tiny("llama")
    compiled = adapted(model, lora("embed"), tokens={"add": NEW}, noise=0.1)
    inputs = {"input_ids": numbers(entries_of(model), new=True)}
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5


def test_refusals() -> None:
    """Gaps, repeated and empty tokens, and models that do not declare their table of tokens, are refused."""
    refused(fresh, "llama", EVERY, tokens={"add": ["<a>"], "first": 200}, code="GC018")
    refused(fresh, "llama", EVERY, tokens={"add": ["<a>", "<a>"]}, code="GC002")
    refused(fresh, "llama", EVERY, tokens={"add": [""]}, code="GC002")
    refused(fresh, "llama", EVERY, tokens={"add": []}, code="GC002")
    plain = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    inputs = {"input": torch.zeros(2, 3, dtype=torch.long)}
    refused(fresh, plain, EVERY, inputs=inputs, tokens={"add": ["<a>"]}, code="GC018")


@pytest.mark.full
def test_no_tokens_looked_up() -> None:
    """Calling with embeddings is refused, because it would bypass the new rows."""
    model: Any = tiny("llama")
    compiled = fresh(model, QUERIES, tokens={"add": NEW})
    with pytest.raises(GraftError) as caught:
        compiled(inputs_embeds=torch.randn(2, 5, model.config.hidden_size))
    assert caught.value.code == "GC031"
