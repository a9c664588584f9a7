"""Data sets for cloze training are disjoint, the same in every run, and the same on disk as in memory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.pet_data import NEWSGROUPS, SETS, few, load_newsgroups, main, stripped
from graftc.applications.demo.data import find_model


@pytest.mark.full
@pytest.mark.parametrize("name", SETS)
def test_a_task_is_drawn(name: str) -> None:
    task = few(name, per_class=10, unlabelled=200, test=100, seed=1)
    assert set(Counter(task.labelled.labels).values()) == {10} and set(task.labelled.labels) == {
        *range(len(task.names))
    }
    assert len(task.unlabelled) == 200 and len(task.test) == 100
    assert not {*task.labelled.texts, *task.unlabelled} & set(task.test.texts)
    assert not set(task.labelled.texts) & set(task.unlabelled)
    assert few(name, per_class=10, unlabelled=200, test=100, seed=1) == task
    more = few(name, per_class=20, unlabelled=200, test=100, seed=1)
    assert set(task.labelled.texts) <= set(more.labelled.texts) and more.test == task.test
    none = few(name, per_class=0, unlabelled=10**6, test=100, seed=2)
    assert len(none.labelled) == 0 and none.test != task.test and len(none.unlabelled) == len(set(none.unlabelled))


def test_a_class_gives_all_it_has() -> None:
    counts = Counter(few("r8", per_class=50).labelled.labels)
    assert sorted(counts.values()) == [41] + [50] * 7


@pytest.mark.full
def test_class_names_are_tokens() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_model())
    assert load_newsgroups().names == tuple(sorted(NEWSGROUPS))
    assert all(tokenizer.tokenize(name) == [name] for name in NEWSGROUPS)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (
            "re mars in article a foo edu a foo edu ann lee writes in article b bob c writes it is",
            "re mars it is",
        ),
        ("re mars a b ann foo edu ann lee writes is it far", "re mars is it far"),
        (
            "he writes about space on sci space shuttle and comp sys ibm pc hardware daily",
            "he writes about space on and daily",
        ),
        ("alt atheism", ""),
    ],
)
def test_what_is_stripped(text: str, left: str) -> None:
    assert stripped(text) == left


def test_the_command_writes_lines(tmp_path: Path) -> None:
    for _ in range(2):
        main(
            [
                "--set",
                "r8",
                "--per-class",
                "2",
                "--unlabelled",
                "5",
                "--test",
                "7",
                "--seed",
                "3",
                "--out",
                str(tmp_path),
            ]
        )
    task = few("r8", 2, 5, 7, 3)
    rows = {
        stem: [json.loads(line) for line in (tmp_path / f"{stem}.jsonl").read_text().splitlines()]
        for stem in ("train", "unlabelled", "test")
    }
    assert [row["text"] for row in rows["train"]] == list(task.labelled.texts)
    assert [row["label"] for row in rows["test"]] == [task.names[k] for k in task.test.labels]
    assert rows["unlabelled"] == [{"text": text} for text in task.unlabelled]
