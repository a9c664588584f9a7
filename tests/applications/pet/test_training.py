"""Parts of PET's training: batches, the schedule, and the final classifier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graftc.applications.pet.classifier import sequence_classifier
from graftc.applications.pet.plain import PlainEncoder, pad_id, positions_of
from graftc.applications.pet.training import _pacing, draws
from graftc.compiler.missing_weights import require_weights
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import tiny
from tests.applications.pet.small import model, tokenizer


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (3, 8), (4, 4), (1, 3)])
def test_every_batch_is_full_and_every_epoch_has_all_rows(rows: int, size: int) -> None:
    batches = list(islice(draws(rows, size, _generator()), 3 * rows))
    assert {len(batch) for batch in batches} == {size}
    drawn = [row for batch in batches for row in batch]
    for epoch in range(len(drawn) // rows):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert batches == list(islice(draws(rows, size, _generator()), 3 * rows))


def test_no_rows_make_no_batch() -> None:
    with pytest.raises(ValueError, match="no rows"):
        next(draws(0, 4, _generator()))


def test_the_rate_rises_and_falls_linearly() -> None:
    pace = _pacing(10, 0.2)
    assert [pace(step) for step in range(10)] == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    assert [_pacing(4, 0.0)(step) for step in range(5)] == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_classifier_has_the_language_models_encoder() -> None:
    base: Any = model()
    classifier = sequence_classifier(base, ["a", "b", "c"], 0, 7)
    for name, tensor in base.bert.state_dict().items():
        assert tensor.data_ptr() == classifier.bert.state_dict()[name].data_ptr()  # compiling changes no base
    assert classifier.config.id2label == {0: "a", 1: "b", 2: "c"} and base.config.num_labels == 2
    again, other = (sequence_classifier(base, ["a", "b", "c"], 0, seed) for seed in (7, 8))
    assert torch.equal(classifier.classifier.weight, again.classifier.weight)
    assert not torch.equal(classifier.classifier.weight, other.classifier.weight)
    with pytest.raises(GraftError) as error:  # the head and the pooler are new
        require_weights(classifier)
    assert error.value.code == "GC089"


def test_random_numbers_elsewhere_stay_as_they_are() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    base = tiny("gpt2")
    torch.manual_seed(3)
    sequence_classifier(base, ["a", "b"], 5, 0)
    assert torch.equal(torch.rand(2), expected)


def test_decoders_learn_which_token_pads() -> None:
    classifier = sequence_classifier(tiny("gpt2"), ["a", "b"], 5, 0)
    assert classifier.config.pad_token_id == 5


@pytest.mark.parametrize("family", ["t5", "llama", "roberta"])
def test_classifiers_of_other_families(family: str) -> None:
    base: Any = tiny(family)
    classifier = sequence_classifier(base, ["a", "b"], 0, 0)
    known = {tensor.sum().item() for tensor in base.state_dict().values() if tensor.is_floating_point()}
    body = getattr(classifier, classifier.base_model_prefix).state_dict()
    assert all(tensor.sum().item() in known for tensor in body.values() if tensor.is_floating_point())


@pytest.mark.slow
def test_a_model_without_a_classifier_is_refused() -> None:
    with pytest.raises(GraftError, match="no sequence classifier") as error:
        sequence_classifier(tiny("vit"), ["a", "b"], 0, 0)
    assert error.value.code == "GC182"


class Packed(nn.Module):
    """A linear map whose weight is stored in another form."""

    def __init__(self, own: nn.Linear, name: str) -> None:
        super().__init__()
        self.register_buffer(name, torch.zeros(own.weight.numel() // 2, 1, dtype=torch.uint8))
        self.bias = own.bias


def _packed(layer: Any, name: str) -> None:
    layer.output.dense = Packed(layer.output.dense, name)


def _narrow(layer: Any) -> None:
    layer.output.dense.weight = nn.Parameter(torch.zeros(3, 3))


class Halved(nn.Linear):
    """A linear map of another class, which a new classifier would not have."""


def _replaced(layer: Any) -> None:
    layer.attention.self.query.__class__ = Halved


def _hooked(layer: Any) -> None:
    layer.register_forward_hook(lambda *_: None)


def _patched(layer: Any) -> None:
    layer.forward = layer.forward


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda layer: _packed(layer, "weight"),
            "output.dense of BertForMaskedLM is a tests.applications.pet.test_training.Packed,",
        ),
        (
            lambda layer: _packed(layer, "codes"),
            "output.dense of BertForMaskedLM is a tests.applications.pet.test_training.Packed,",
        ),
        (_narrow, "layer.0.output.dense of BertForMaskedLM is not stored in the same form"),
        (
            _replaced,
            "is a tests.applications.pet.test_training.Halved, but in a new classifier it is a torch.nn.",
        ),
        (_hooked, "layer.0 of BertForMaskedLM has its own forward or hooks"),
        (_patched, "layer.0 of BertForMaskedLM has its own forward or hooks"),
    ],
)
def test_what_a_new_classifier_would_not_have_is_refused(change: Callable[[Any], None], said: str) -> None:
    """A base is refused if a classifier would silently get random or different layers."""
    base: Any = model()
    change(base.bert.encoder.layer[0])
    with pytest.raises(GraftError) as error:
        sequence_classifier(base, ["a", "b"], 0, 0)
    assert error.value.code == "GC182" and said in error.value.message


def test_modules_that_a_model_shares_are_not_shared_in_a_classifier(tmp_path: Path) -> None:
    """The class of the classifier would not save shared modules."""
    base: Any = model(num_hidden_layers=2)
    base.bert.encoder.layer[1].attention.self.query = base.bert.encoder.layer[0].attention.self.query
    classifier = sequence_classifier(base, ["a", "b"], 0, 0)
    classifier.save_pretrained(tmp_path)
    first, second = (layer.attention.self.query.weight for layer in classifier.bert.encoder.layer)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def test_fields_are_a_text_or_a_pair() -> None:
    own = tokenizer()
    one = PlainEncoder(["text"], own, 16).encode([{"text": "moon orbit"}, {"text": "ice"}])
    assert one["input_ids"].tolist() == [own("moon orbit")["input_ids"], [*own("ice")["input_ids"], pad_id(own)]]
    assert one["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    row = {"a": "moon star", "b": "ice", "c": "rink"}
    pair = PlainEncoder(["a", "b", "c"], own, 16).encode([row])
    assert pair["input_ids"][0].tolist() == own("moon star", "ice rink")["input_ids"]
    assert Counter(pair["token_type_ids"][0].tolist()) == {0: 4, 1: 3}
    short = PlainEncoder(["a", "b", "c"], own, 6).encode([row])
    assert short["input_ids"].shape == (1, 6)


def test_positions_of_a_model() -> None:
    assert positions_of(model()) == 32
    assert positions_of(tiny("roberta")) == 62
    assert positions_of(tiny("llama")) is None
