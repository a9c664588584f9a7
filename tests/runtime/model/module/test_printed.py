"""The text that ``print(compiled)`` shows."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch

import graftc
from graftc.testing.families import tiny

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
EXPECTED = """\
BertForSequenceClassification(
  (bert): BertModel(
    (embeddings): BertEmbeddings(
      (word_embeddings): Embedding(101, 48, padding_idx=0)
      (position_embeddings): Embedding(512, 48)
      (token_type_embeddings): Embedding(2, 48)
      (LayerNorm): LayerNorm((48,), eps=1e-12, elementwise_affine=True, bias=True)
      (dropout): Dropout(p=0.1, inplace=False)
    )
    (encoder): BertEncoder(
      (layer): ModuleList(
        (0-1): 2 x BertLayer(
          + pfeiffer: bottleneck 4, ffn.sublayer, 436 trainable
          (attention): BertAttention(
            (self): BertSelfAttention(
              (query): Linear(
                in_features=48, out_features=48, bias=True
                + att: lora, rank 2, weight [48, 48], 192 trainable
              )
              (key): Linear(in_features=48, out_features=48, bias=True)
              (value): Linear(
                in_features=48, out_features=48, bias=True
                + att: lora, rank 2, weight [48, 48], 192 trainable
              )
              (dropout): Dropout(p=0.1, inplace=False)
            )
            (output): BertSelfOutput(
              (dense): Linear(in_features=48, out_features=48, bias=True)
              (LayerNorm): LayerNorm((48,), eps=1e-12, elementwise_affine=True, bias=True)
              (dropout): Dropout(p=0.1, inplace=False)
            )
          )
          (intermediate): BertIntermediate(
            (dense): Linear(in_features=48, out_features=80, bias=True)
            (intermediate_act_fn): GELUActivation()
          )
          (output): BertOutput(
            (dense): Linear(
              in_features=80, out_features=48, bias=True
              + ia3: weight [48, 80], 80 trainable
            )
            (LayerNorm): LayerNorm((48,), eps=1e-12, elementwise_affine=True, bias=True)
            (dropout): Dropout(p=0.1, inplace=False)
          )
        )
      )
    )
    (pooler): BertPooler(
      (dense): Linear(in_features=48, out_features=48, bias=True)
      (activation): Tanh()
    )
  )
  (dropout): Dropout(p=0.1, inplace=False)
  (classifier): Linear(
    in_features=48, out_features=3, bias=True
    + trained: weight [3, 48] (trained copy), bias [3] (trained copy), 147 trainable
  )
)
trainable parameters: 1,947 of 68,878 (2.8267%), 147 of them in copies of the base's tensors"""


# Releases of torch differ in what they print of a layer.
EXPECTED = EXPECTED.replace(
    "LayerNorm((48,), eps=1e-12, elementwise_affine=True, bias=True)", repr(torch.nn.LayerNorm(48, eps=1e-12))
)


def lines(compiled: Any, word: str) -> list[str]:
    return [line.strip() for line in str(compiled).splitlines() if word in line]


@pytest.fixture(scope="module")
def bert() -> Any:
    adapt = [{**LORA, "name": "att"}, {"method": "pfeiffer", "bottleneck": 4}]
    adapt.append({"method": "ia3", "target": {"role": "ffn.down"}})
    return graftc.compile({"adapt": adapt, "train": ["classifier"]}, tiny("bert"))


@pytest.mark.slow
def test_the_tree_says_what_is_adapted_and_how_much_trains(bert: Any) -> None:
    assert str(bert) == EXPECTED
    trainable, total = bert.get_nb_trainable_parameters()
    assert f"parameters: {trainable:,} of {total:,} ({100 * trainable / total:.4f}%)" in str(bert)
    assert (trainable - 147, 147) == (bert.report.trainable_parameters, bert.report.trained_in_full)
    assert str(copy.deepcopy(bert)) == EXPECTED


@pytest.mark.slow
def test_counts_follow_what_trains_now(bert: Any) -> None:
    copied = copy.deepcopy(bert)
    copied.train_only("att")
    assert lines(copied, "+ att") == ["+ att: lora, rank 2, weight [48, 48], 192 trainable"] * 2
    assert lines(copied, "+ ia3") == ["+ ia3: weight [48, 80], 0 trainable"]
    assert lines(copied, "parameters:") == ["trainable parameters: 768 of 68,878 (1.1150%)"]


@pytest.mark.slow
def test_layers_that_differ_are_shown_each(bert: Any) -> None:
    override = {"role": "attn.v", "layers": [1], "rank": 3}
    compiled = graftc.compile({"adapt": [{**LORA, "overrides": [override]}]}, tiny("bert"))
    assert lines(compiled, "BertLayer(") == ["(0): BertLayer(", "(1): BertLayer("]
    ranks = [line.split(",")[0] for line in lines(compiled, "+ lora")]
    assert ranks == ["+ lora: rank 2"] * 3 + ["+ lora: rank 3"]


@pytest.mark.slow
def test_rows_of_fused_weights_and_tensors_that_sites_share() -> None:
    vera = {"method": "vera", "rank": 8, "target": {"role": "ffn.up"}}
    compiled = graftc.compile(
        {"adapt": [LORA, vera, {"method": "bitfit", "target": {"role": "ffn.down"}}]}, tiny("gpt2")
    )
    assert lines(compiled, "+ lora") == [
        "+ lora: rank 2, weight [48, 144] rows 0:48, weight [48, 144] rows 96:144, 384 trainable"
    ]
    assert lines(compiled, "+ vera") == ["+ vera: rank 8, 0 trainable", "+ vera: rank 8, weight [48, 80], 88 trainable"]
    assert lines(compiled, "+ bitfit") == ["+ bitfit: weight [80, 48], bias [48] (trained copy), 48 trainable"]


@pytest.mark.slow
def test_adaptations_that_are_alike_are_one_line() -> None:
    names = [f"t{number}" for number in range(30)]
    spec = {"adapt": [{**LORA, "name": name} for name in names], "compose": [{"name": "tasks", "bank": names}]}
    compiled = graftc.compile(spec, tiny("bert"))
    entries = lines(compiled, "+ t0")
    assert entries == ["+ t0, t1, ..., t29 (30 alike): lora, rank 2, weight [48, 48], 192 trainable"] * 2
    assert lines(compiled, "+ tasks") == ["+ tasks: bank"]
    assert len(str(compiled).splitlines()) < 60
    started = time.process_time()
    str(compiled)
    assert time.process_time() - started < 1  # it takes about 10 ms


def test_a_part_prints_its_tensors(bert: Any) -> None:
    text = str(bert.bert.encoder.layer[0].attention.self.query)
    assert text == (
        "Linear(\n  in_features=48, out_features=48, bias=True\n  + att: A [2, 48], B [48, 2], 192 trainable\n)"
    )
    assert str(bert.bert.encoder.layer).startswith("ModuleList(\n  (0-1): 2 x BertLayer(")


def test_other_models_and_merged_ones_print() -> None:
    class Nothing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.part(x)
            return output

    lora = {"method": "lora", "rank": 1, "target": {"modules": "part"}}
    compiled = graftc.compile({"adapt": [lora]}, Nothing(), (torch.randn(2, 3),), cache=False)
    assert str(compiled).splitlines()[0] == "Nothing("
    assert (
        str(compiled.merge(allow_unchanged=True))
        == "Merged(\n  (part): Linear(in_features=3, out_features=3, bias=True)\n)"
    )
