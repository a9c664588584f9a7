"""Language models that classify by filling blanks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graftc
from graftc.testing.perturbing import randomise

BLANK, START, SENTINEL = 4, 0, 99
LABELS = ["a", "b", "c"]
ONE = [[[10]], [[20], [22], [24]], [[30], [31]]]
TWO = [[[10, 11]], [[20, 21], [22, 23], [24, 25]], [[30, 31], [31, 30]]]
LORA = {"method": "lora", "rank": 2, "target": {"role": "attn.q"}}
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES))


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForMaskedLM

    return RobertaForMaskedLM(RobertaConfig(**{**SIZES, "pad_token_id": 1}))


def _deberta() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    return DebertaV2ForMaskedLM(DebertaV2Config(**SIZES))


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    layers = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"vocab_size": 100, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.2}
    return BartForConditionalGeneration(BartConfig(**sizes, **layers, **heads))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=100, bos_token_id=0, eos_token_id=0, **sizes))


def _gemma() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "num_key_value_heads": 2, "head_dim": 8}))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=100, d_model=32, num_layers=2, num_heads=4, d_ff=48, d_kv=8))


MASKED = {"bert": _bert, "roberta": _roberta, "deberta": _deberta, "bart": _bart}
OTHERS = {"gpt2": _gpt2, "gemma": _gemma, "t5": _t5}


@functools.cache
def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        return randomise({**MASKED, **OTHERS}[name]()).eval()


def cloze(name: str, words: Any, labels: Sequence[str] = LABELS) -> dict[str, Any]:
    where = (
        {"blank": BLANK} if name in MASKED else {"decoder": [START, SENTINEL]} if name == "t5" else {"blank": "last"}
    )
    return {**where, "labels": [*labels], "verbalizers": [words]}


def texts() -> tuple[Tensor, Tensor]:
    """Three texts with two blanks each, one of them shorter."""
    ids = torch.randint(5, 98, (3, 9), generator=torch.Generator().manual_seed(1))
    for row, places in enumerate(((2, 5), (3, 4), (0, 8))):
        ids[row, list(places)] = BLANK
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


@torch.no_grad()
def scores(name: str, ids: Tensor, mask: Tensor, words: Any) -> Tensor:
    """Compute the logits of labels from the logits that the model itself gives for all tokens."""
    decoder = {"decoder_input_ids": torch.tensor([[START, SENTINEL]]).expand(len(ids), 2)} if name == "t5" else {}
    logits = model_of(name)(input_ids=ids, attention_mask=mask, **decoder).logits
    blanks = len(words[0][0])
    rows = []
    for row in range(len(ids)):
        places = (ids[row] == BLANK).nonzero().flatten().tolist()[:blanks]
        if name not in MASKED:
            places = [1 if name == "t5" else int(mask[row].sum()) - 1]
        each = [[sum(logits[row, p, t] for p, t in zip(places, word, strict=True)) for word in own] for own in words]
        rows.append(torch.stack([torch.stack(own).mean() for own in each]))
    return torch.stack(rows)


@pytest.mark.full
@pytest.mark.parametrize("name", [*MASKED, *OTHERS])
def test_class_logits_are_the_models_logits_of_the_words_at_the_blank(name: str) -> None:
    ids, mask = texts()
    words = TWO if name in MASKED else ONE
    compiled = graftc.compile({"adapt": [LORA], "cloze": cloze(name, words)}, model_of(name)).eval()
    outputs = compiled(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(outputs.logits, scores(name, ids, mask, words), atol=1e-6, rtol=1e-6)
    wide = [n for n in compiled.compilation.program("eval").graph.nodes if _is_wide(n)]
    assert wide, "there is no head"
    assert {int(n.meta["val"].shape[1]) for n in wide} == {len(words[0][0])}, "the head is computed elsewhere too"


def _is_wide(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] == SIZES["vocab_size"]


@pytest.mark.full
def test_permuted_labels_permute_logits() -> None:
    ids, mask = texts()
    order = [2, 0, 1]
    first, other = (
        graftc.compile({"adapt": [], "cloze": cloze("bert", words, labels)}, model_of("bert")).eval()
        for words, labels in ((TWO, LABELS), ([TWO[n] for n in order], [LABELS[n] for n in order]))
    )
    assert torch.equal(first(ids, mask).logits[:, order], other(ids, mask).logits)
    assert other.config.id2label == dict(enumerate("cab"))
    assert other.config.num_labels == 3


@pytest.mark.full
def test_rows_have_their_own_verbalizers() -> None:
    ids, mask = texts()
    options = {**cloze("bert", TWO), "verbalizers": [TWO, ONE]}
    compiled = graftc.compile({"adapt": [], "cloze": options}, model_of("bert")).eval()
    wanted = torch.stack([scores("bert", ids, mask, words) for words in (TWO, ONE)])
    pattern = torch.tensor([1, 0, 1])
    logits = compiled(ids, mask, pattern=pattern).logits
    torch.testing.assert_close(logits, wanted[pattern, torch.arange(3)], atol=1e-6, rtol=1e-6)
    with pytest.raises(graftc.GraftError, match="pattern does not choose one for every row"):
        compiled(ids, mask)


@pytest.mark.full
def test_losses_are_of_labels_their_probabilities_and_of_tokens() -> None:
    ids, mask = texts()
    compiled = graftc.compile({"adapt": [], "train": ["**"], "cloze": cloze("bert", TWO)}, model_of("bert")).eval()
    logits = compiled(ids, mask).logits
    labels, soft = torch.tensor([0, 2, 1]), torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5], [1.0, 0.0, 0.0]])
    for given in (labels, soft):
        torch.testing.assert_close(compiled(ids, mask, labels=given).loss, F.cross_entropy(logits, given))
    tokens = torch.where(ids == BLANK, 7, -100)
    outputs = compiled(ids, mask, token_targets=tokens)
    wanted = model_of("bert")(ids, mask, labels=tokens)
    torch.testing.assert_close((outputs.loss, outputs.logits), (wanted.loss, wanted.logits), atol=1e-6, rtol=1e-6)


@pytest.mark.full
def test_the_loss_of_tokens_and_that_of_labels_train_the_same_tensors() -> None:
    ids, mask = texts()
    compiled = graftc.compile({"adapt": [LORA], "cloze": cloze("bert", TWO)}, model_of("bert")).train()
    given: list[dict[str, Tensor]] = [{"labels": torch.tensor([0, 2, 1])}, {"token_targets": ids}]
    for each in given:
        compiled.zero_grad()
        compiled(ids, mask, **each).loss.backward()
        gradients = [p.grad for n, p in compiled.named_parameters() if p.requires_grad and n.endswith("B")]
        assert gradients
        assert all(g is not None and g.abs().max() > 0 for g in gradients)


@pytest.mark.full
def test_an_artifact_and_a_merged_model_classify_the_same(tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    ids, mask = texts()
    compiled = trained()
    wanted = compiled(ids, mask).logits
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", model_of("bert")).eval()
    assert torch.equal(loaded(ids, mask).logits, wanted)
    merged = compiled.merge()
    torch.testing.assert_close(merged(ids, mask).logits, wanted, atol=1e-5, rtol=1e-5)
    plain = merged.to_transformers()
    assert type(plain) is BertForMaskedLM
    assert plain(ids, mask).logits.shape == (3, 9, 100)


def trained() -> Any:
    compiled = graftc.compile({"adapt": [LORA], "cloze": cloze("bert", TWO)}, model_of("bert")).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return compiled


@pytest.mark.full
def test_onnx_runtime_classifies_the_same(tmp_path: Path) -> None:
    ids, mask = texts()
    compiled = trained()
    compiled.export(tmp_path / "cloze.onnx")
    (logits,) = onnxruntime.InferenceSession(str(tmp_path / "cloze.onnx")).run(
        None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    )
    torch.testing.assert_close(torch.from_numpy(logits), compiled(ids, mask).logits.detach(), atol=2e-5, rtol=1e-5)


def _no_head() -> nn.Module:
    from transformers import BertModel

    return BertModel(model_of("bert").config)  # type: ignore[arg-type]


def _classifier() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(model_of("bert").config)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [_no_head, _classifier, lambda: nn.Linear(3, 3)])
def test_models_without_a_head_over_tokens_are_refused(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(graftc.GraftError, match="no head over a vocabulary"):
        graftc.compile({"adapt": [], "cloze": cloze("bert", TWO)}, make())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_tokens_for_a_decoder_that_is_not_there_are_refused(family: str) -> None:
    """Without a decoder, such tokens would decide which position of the text is read."""
    options = {**cloze("bert", [[[1]], [[2]], [[3]]]), "blank": None, "decoder": [0, 3]}
    with pytest.raises(graftc.GraftError, match="has no separate decoder") as caught:
        graftc.compile({"adapt": [], "cloze": options}, model_of(family))
    assert caught.value.code == "GC170" and str(caught.value.place) == "cloze.decoder"


def test_a_forward_that_was_replaced_in_an_instance_is_refused() -> None:
    """A replaced forward computes with the tensors of the source model, which do not train."""
    model: Any = model_of("bert")
    query = model.bert.encoder.layer[0].attention.self.query
    query.forward = query.forward
    try:
        with pytest.raises(graftc.GraftError, match="query was replaced on the instance") as caught:
            graftc.compile({"adapt": [], "cloze": cloze("bert", TWO)}, model)
    finally:
        del query.forward
    assert caught.value.code == "GC170"


@pytest.mark.full
@pytest.mark.parametrize("blank", [5, "last"])
def test_blanks_in_the_input_of_t5_are_refused(blank: int | str) -> None:
    """The first tokens of T5's decoder have to be given; BART makes them by shifting its input."""
    with pytest.raises(graftc.GraftError, match=r"decoder receives no tokens(.|\n)*decoder: \[pad token") as caught:
        graftc.compile({"adapt": [], "cloze": {**cloze("bert", [[[1]], [[2]], [[3]]]), "blank": blank}}, model_of("t5"))
    assert caught.value.code == "GC170" and str(caught.value.place) == "cloze.blank"


def test_a_token_that_the_model_has_not_is_named() -> None:
    with pytest.raises(graftc.GraftError, match="there is no token 100: the model has 100") as caught:
        graftc.compile({"adapt": [], "cloze": cloze("bert", [[[1]], [[2]], [[3], [100]]])}, model_of("bert"))
    assert caught.value.place is not None
    assert caught.value.place.path == "cloze.verbalizers[0][2][1][0]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": [0]}, "both blank and decoder"),
        ({"blank": None}, "neither blank nor decoder"),
        ({"labels": ["a", "b", "a"]}, "'a' is listed twice"),
        ({"labels": ["a", "b"]}, "words for 3 labels, but there are 2"),
        ({"verbalizers": [[[[1]], [[2]], [[2]]]]}, "'b' and 'c' have the same words"),
        ({"verbalizers": [[[[1]], [[2], [3, 4]], [[5]]]]}, "a word has 2 tokens, but the first word"),
        ({"blank": "last", "verbalizers": [TWO]}, "only one token is predicted after a text"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(graftc.GraftError, match=message):
        graftc.load_spec({"adapt": [], "cloze": {**cloze("bert", ONE), **changes}})


@pytest.mark.slow
def test_more_blanks_than_a_text_has_tokens() -> None:
    """If a text has fewer tokens than there are blanks, as in captures, other positions are read."""
    words = [[[*range(10, 30)]], [[*range(30, 50)]], [[*range(50, 70)]]]
    compiled = graftc.compile({"adapt": [], "cloze": cloze("bert", words)}, model_of("bert")).eval()
    ids = torch.randint(5, 98, (2, 30), generator=torch.Generator().manual_seed(2))
    ids[:, 4:24] = BLANK
    mask = torch.ones_like(ids)
    torch.testing.assert_close(compiled(ids, mask).logits, scores("bert", ids, mask, words), atol=2e-5, rtol=1e-5)
    assert compiled(ids[:, :1], mask[:, :1]).logits.shape == (2, 3)


@pytest.mark.full
def test_what_is_called_wrongly_is_said() -> None:
    ids, mask = texts()
    options = {**cloze("bert", TWO), "verbalizers": [TWO, ONE]}
    compiled = graftc.compile({"adapt": [], "cloze": options}, model_of("bert")).eval()
    for pattern in (torch.tensor([0]), torch.tensor([[0, 1, 0]])):
        with pytest.raises(graftc.GraftError, match="pattern does not choose one for every row"):
            compiled(ids, mask, pattern=pattern)
    with pytest.raises(graftc.GraftError, match="both labels and token_targets"):
        compiled(ids, mask, labels=torch.tensor([0, 1, 2]), token_targets=ids, pattern=torch.tensor([0, 1, 0]))


@pytest.mark.slow
def test_a_cloze_does_not_generate() -> None:
    compiled = graftc.compile({"adapt": [], "cloze": cloze("gpt2", ONE)}, model_of("gpt2")).eval()
    with pytest.raises(graftc.GraftError, match="GC142"):
        compiled.generate(torch.tensor([[5, 6]]))


@pytest.mark.full
def test_the_trainer_evaluates_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    ids, mask = texts()
    rows = [{"input_ids": i, "attention_mask": m, "labels": n} for n, (i, m) in enumerate(zip(ids, mask, strict=True))]
    compiled = graftc.compile({"adapt": [LORA], "cloze": cloze("bert", TWO)}, model_of("bert"))
    given = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    metrics = Trainer(model=compiled, args=given, eval_dataset=rows).evaluate()  # type: ignore[arg-type]
    assert metrics["eval_loss"] > 0
