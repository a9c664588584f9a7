from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from graftc.applications.demo.baseline import embed, logistic_regression
from graftc.applications.demo.data import Encoded
from graftc.applications.demo.training import predict, score, train
from graftc.records.applications.demo import Scores


class Toy(nn.Module):
    """A model of two linear layers, the first frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.base.requires_grad_(False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self.head(self.base(x))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def separable(seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 6, generator=draw)
        yield {"x": x, "labels": x[:, :3].argmax(1)}


def test_scores_by_hand() -> None:
    # Class 0: 2 right of 4 predicted and 2 actual; class 1: 1 of 1 and 2; class 2: never predicted, 1 actual.
    scores = score([0, 0, 0, 1, 0], [0, 0, 1, 1, 2], classes=3)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.macro_f1 == pytest.approx((2 * 2 / (4 + 2) + 2 * 1 / (1 + 2) + 0) / 3)


@pytest.mark.slow
def test_scores_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(3)
    predicted = torch.randint(0, 5, (300,), generator=draw).tolist()
    actual = [p if i % 3 else (p + i) % 5 for i, p in enumerate(predicted)]
    scores = score(predicted, actual, 5)
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(actual, predicted))
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(actual, predicted, average="macro"))


@pytest.mark.parametrize(("predicted", "actual"), [([], []), ([1], [1, 0])])
def test_scores_need_a_prediction_for_each_example(predicted: list[int], actual: list[int]) -> None:
    with pytest.raises(ValueError, match="predictions for"):
        score(predicted, actual, 2)


def test_training_learns_and_leaves_frozen_tensors_alone() -> None:
    torch.manual_seed(0)
    model = Toy().eval()
    base = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    seen: list[tuple[int, float]] = []
    run = train(model, separable(), 60, lr=5e-2, on_step=lambda *step: seen.append(step))
    assert seen == list(enumerate(run.losses, start=1)) and len(seen) == 60
    assert sum(run.losses[-10:]) < 0.7 * sum(run.losses[:10])
    assert all(torch.equal(base[name], tensor) for name, tensor in model.base.state_dict().items())
    assert all(p.grad is None for p in model.base.parameters())
    assert model.training and run.seconds > 0


def test_training_is_repeatable() -> None:
    def losses() -> tuple[float, ...]:
        torch.manual_seed(1)
        return train(Toy(), separable(2), 5, lr=1e-2).losses

    assert losses() == losses()


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(()))

        def forward(self, x: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=(self.p * x).sum())

    # Adam's step on a constant gradient is the learning rate itself.
    model, at = Constant(), [0.0]
    batches = iter([{"x": torch.ones(1)}] * 20)
    train(model, batches, 20, lr=1.0, on_step=lambda *_: at.append(-model.p.item()))
    rates = [b - a for a, b in pairwise(at)]
    assert rates[:2] == pytest.approx([0.5, 1.0], rel=1e-3)
    assert rates[2:] == pytest.approx([(20 - step) / 18 for step in range(2, 20)], rel=1e-3)


def test_a_loss_that_is_no_number_ends_training() -> None:
    def broken() -> Iterator[dict[str, torch.Tensor]]:
        good = separable()
        yield next(good)
        yield {**next(good), "x": torch.full((16, 6), float("nan"))}

    with pytest.raises(FloatingPointError, match="the loss of step 2 is nan"):
        train(Toy(), broken(), 2, lr=1e-2)


def test_predictions_come_in_the_order_of_the_data() -> None:
    data = Encoded(((7, 7, 7), (3,), (9, 9), (4, 4, 4, 4)), (0, 0, 0, 0), pad=0)
    counts: list[int] = []
    logits = predict(lambda batch: batch["input_ids"][:, :1].double(), data, size=3, on_batch=counts.append)
    assert logits.tolist() == [[7.0], [3.0], [9.0], [4.0]]
    assert counts == [3, 1] and logits.dtype == torch.float32


def test_embeddings_ignore_padding_and_have_unit_length() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    encoder = BertModel(config)
    data = Encoded(((1, 2, 3, 4, 5), (6, 7), (8,)), (0, 1, 0), pad=0)
    vectors = embed(encoder, data)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3))
    with torch.no_grad():
        for row, ids in zip(vectors, data.ids, strict=True):
            alone = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            assert torch.allclose(row, alone / alone.norm(), atol=1e-6)


@pytest.mark.slow
def test_logistic_regression_is_scored_on_the_test_rows() -> None:
    pytest.importorskip("sklearn")
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    train, labels = points.repeat(20, 1), [0, 1] * 20
    assert logistic_regression(train, labels, points, [0, 1], 2) == Scores(1.0, 1.0)
    assert logistic_regression(train, labels, points, [1, 0], 2) == Scores(0.0, 0.0)
