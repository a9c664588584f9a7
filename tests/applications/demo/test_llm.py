"""The demo on a language model: its conversations, its promises, and the path from end to end with a tiny model."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from graftc.applications.demo import llm
from graftc.applications.demo.chat import Topics, topics_of
from graftc.applications.demo.data import Dataset, DataSplit, load_r8
from graftc.applications.demo.decoder import find_decoder
from graftc.applications.demo.generation import greedy
from graftc.records.applications.demo import (
    AllTopicScores,
    DemoTraining,
    ExampleCounts,
    LLMResult,
    Scores,
    TokenAgreement,
    TopicScores,
)
from graftc.records.certificate import Certificate
from graftc.records.reading import from_json
from graftc.records.report import Report
from graftc.specs.io import parse_spec
from tests.cli.samples import CERTIFICATE, REPORT

SCORES = AllTopicScores(
    TopicScores(Scores(0.1, 0.1), 0.0), TopicScores(Scores(0.9, 0.8), 0.9), TopicScores(Scores(0.9, 0.8), 0.89)
)
GOOD = LLMResult(
    quick=False,
    examples=ExampleCounts(16, 5),
    training=DemoTraining(2, 8, 1e-6),
    scores=SCORES,
    answers=(),
    report=from_json(Report, json.dumps(REPORT)),
    certificate=from_json(Certificate, json.dumps(CERTIFICATE)),
    same_tokens={"merged": TokenAgreement(8, 8, 16)},
    seconds={},
    files={},
    bytes={},
)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"scores": replace(SCORES, untuned=TopicScores(Scores(0.75, 0.1), 0.0))}, "by likelihood, tuning"),
        ({"scores": replace(SCORES, untuned=TopicScores(Scores(0.1, 0.1), 0.75))}, "by generation, tuning"),
        ({"scores": replace(SCORES, peft=TopicScores(Scores(0.92, 0.8), 0.9))}, "by likelihood, the accuracy"),
        ({"scores": replace(SCORES, peft=TopicScores(Scores(0.9, 0.8), float("nan")))}, "by generation, the accuracy"),
        ({"certificate": replace(GOOD.certificate, structure="other")}, "certificate"),
        ({"same_tokens": {"merged": TokenAgreement(8, 7, 16)}}, "merged generates other tokens"),
    ],
)
def test_each_broken_promise_is_a_failure(change: dict[str, Any], word: str) -> None:
    assert GOOD.passed and GOOD.failures == () and replace(GOOD, scores=replace(SCORES, peft=None)).passed
    result = replace(GOOD, **change)
    assert not result.passed
    assert len(result.failures) == 1 and word in result.failures[0]
    assert result.to_json()["failures"] == list(result.failures)


def test_the_spec_is_valid() -> None:
    assert [(a.name, a.method) for a in parse_spec(llm.SPEC).adapt] == [("topics", "lora")]


@pytest.fixture(scope="module")
def topics() -> Topics:
    from transformers import AutoTokenizer

    names = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
    return topics_of(
        Dataset(names, DataSplit((), ()), DataSplit((), ())), AutoTokenizer.from_pretrained(find_decoder())
    )


@pytest.mark.slow
def test_a_conversation_is_what_the_template_makes_of_it(topics: Topics) -> None:
    chats = topics.chats(DataSplit(("crude oil prices rose", "x " * 200), (1, 7)))
    decode = topics.tokenizer.decode
    assert decode(chats.prompts[0]).endswith(
        "<|im_start|>user\ncrude oil prices rose\n\nWhat is the topic of this text? Answer with one word: deal, oil, "
        "profit, grain, interest, money, ship or trade.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [decode(answer) for answer in chats.answers] == ["oil<|im_end|>", "trade<|im_end|>"]
    assert len(chats.texts[1].split()) == 48, "cut"


def test_the_loss_is_that_of_the_answers_alone(topics: Topics) -> None:
    """The batch's own loss is the mean of full logits' losses over the tokens of the answers."""
    chats = topics.chats(DataSplit(("crude oil prices rose", "grain"), (1, 3)))
    torch.manual_seed(0)
    model = tiny_llama()
    batch = chats.collate([0, 1], labels=True)
    expected: list[torch.Tensor] = []
    for prompt, answer in zip(chats.prompts, chats.answers, strict=True):
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected += [-logits[len(prompt) - 1 + k, token] for k, token in enumerate(answer)]
    assert batch["labels"].ne(-100).sum().item() == len(expected) == 4
    assert model(**batch).loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("answer", "index"),
    [("oil", 1), (" Oil.", 1), ("The deal is about oil.", 0), ("shipping", None), ("", None), ("profits", None)],
)
def test_which_topic_an_answer_names(topics: Topics, answer: str, index: int | None) -> None:
    assert topics.named_in(answer) == index


def test_names_must_be_single_tokens_and_chats_need_a_template(topics: Topics) -> None:
    data = Dataset(("acq",), DataSplit((), ()), DataSplit((), ()))
    with pytest.raises(ValueError, match="no chat template"):
        topics_of(data, SimpleNamespace(chat_template=None))
    pieces: Callable[..., Any] = lambda text, **_: {"input_ids": list(range(len(text)))}  # noqa: E731
    pieces.chat_template = "{{ messages }}"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="these names are not single tokens: deal"):
        topics_of(data, pieces)


def test_greedy_answers_are_in_the_order_of_the_prompts_and_end_with_the_turn(topics: Topics) -> None:
    chats = topics.chats(DataSplit(("one two three four five", "six", "seven eight"), (0, 1, 2)))

    class Echo:
        """A model that outputs the number of tokens of a prompt, ends its turn, and continues."""

        generation_config = SimpleNamespace(eos_token_id=2)

        def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
            length = attention_mask.sum(1, keepdim=True)
            return torch.cat([input_ids, length, torch.full_like(length, 2), length], 1)

    assert greedy(Echo(), chats, 3) == [[len(prompt)] for prompt in chats.prompts]


def tiny_llama() -> Any:
    """Return a model with the real vocabulary, and weights so large that a few steps change its answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": 49152, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3},
        **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True},
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.full
def test_the_demo_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long version runs with PEFT and a tiny model that learns to answer "profits" to all news."""
    news = load_r8()
    earn = [(text, label) for text, label in zip(news.train.texts, news.train.labels, strict=True) if label == 2]
    one_sided = replace(news, train=DataSplit(*map(tuple, zip(*earn, strict=True))))
    monkeypatch.setattr(llm, "load_r8", lambda: one_sided)
    torch.manual_seed(0)
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    for file in find_decoder().iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, base / file.name)
    plan = replace(llm._FULL, steps=16, batch=6, lr=2e-2, test=24, checked=2, tokens=4)
    monkeypatch.setattr(llm, "_FULL", plan)
    monkeypatch.setattr(llm, "find_decoder", lambda: base)
    text = io.StringIO()
    state = torch.random.get_rng_state()
    out = tmp_path / "out"
    result = llm.run_llm_demo(out, console=Console(file=text, width=100))
    assert result.passed, result.failures
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are its own"
    assert result.examples == ExampleCounts(96, 24) and result.scores.peft is not None
    assert result.training.losses_apart is not None and result.training.losses_apart < 1e-4
    labels = news.test.subset(24).labels
    assert result.scores.graftc.likelihood.accuracy == labels.count(2) / len(labels) > 0.4
    assert {"merged", "artifact, reloaded", "PEFT adapter, in PEFT", "ONNX, in ONNX Runtime"} < set(result.same_tokens)
    assert all(form.same == 2 for form in result.same_tokens.values())

    assert json.loads((out / "demo.json").read_text(encoding="utf-8")) == result.to_json()
    assert from_json(LLMResult, json.dumps(result.to_json())).to_json() == result.to_json()
    assert {*result.files.values()} == {path.name for path in out.iterdir()}
    page = (out / "demo.md").read_text(encoding="utf-8")
    for word in ("<|im_start|>assistant", "tuned with PEFT", "certified", "adapter, in PEFT: the same tokens for 2"):
        assert word in text.getvalue()
    for answer in result.answers:
        assert answer.text[:20] in page
    peft = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert peft["peft_type"] == "LORA" and peft["r"] == 8 and len(peft["target_modules"]) == 7
    assert (out / "model" / "chat_template.jinja").is_file()
