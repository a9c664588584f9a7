"""``graftc chat``: turns with a history, whose cache is kept without changing the answers."""

from __future__ import annotations

import io
import os
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from graftc.applications.chat.conversation import Conversation
from graftc.applications.chat.opening import TextModel, open_text_model
from graftc.cli.schemas import published_schema
from graftc.records.applications.answers import Settings
from tests.cli.speakers import heard_interrupts, save_artifact, save_model, save_tokenizer
from tests.cli.support import Outcome, run_here

LINES = ("w1 w2 w3", "w4", "w5 w6")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model(tmp_path_factory.mktemp("chat") / "base")
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(base: Path) -> Path:
    save_artifact(base.parent / "artifact", base)
    return base.parent / "artifact"


@pytest.fixture(scope="module")
def model(artifact: Path) -> TextModel:
    return open_text_model(artifact)


def chat(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    lines: tuple[str, ...],
    *more: str,
) -> Outcome:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run_here(capsys, "chat", str(folder), "-n", "6", *more)


def turns(*given: Any) -> list[dict[str, Any]]:
    outcome = chat(*given, "--json")
    assert (outcome.status, outcome.err) == (0, "")
    Draft202012Validator(published_schema("chat")).validate(outcome.data)
    answers: list[dict[str, Any]] = outcome.data["turns"]
    return answers


def transcript(*messages: str) -> str:
    """Return alternating messages of a user and an assistant in the template's format."""
    roles = ("user:", "assistant:")
    parts = [f"{roles[number % 2]} {text} </s>" for number, text in enumerate(messages)]
    return " ".join([*parts, "assistant:"])


@pytest.mark.full
@pytest.mark.parametrize("kind", ["base", "artifact"])
def test_every_turn_is_what_the_model_says_to_the_transcript(
    kind: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(kind)
    answers = turns(capsys, monkeypatch, folder, LINES)
    assert [turn["said"] for turn in answers] == [*LINES]
    messages: list[str] = []
    for turn in answers:
        messages.append(turn["said"])
        alone = run_here(capsys, "generate", str(folder), "-n", "6", "-p", transcript(*messages), "--json").data
        assert turn["text"] == alone["answers"][0]["text"] and turn["text"]
        assert turn["prompt_tokens"] == alone["answers"][0]["prompt_tokens"]
        messages.append(turn["text"])


@pytest.mark.full
def test_the_cache_is_kept_and_changes_nothing(
    artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (*LINES, "/reset", LINES[0])
    kept = turns(capsys, monkeypatch, artifact, lines)
    anew = turns(capsys, monkeypatch, artifact, lines, "--no-cache")
    assert [turn["ids"] for turn in kept] == [turn["ids"] for turn in anew]
    assert [turn["cached"] for turn in anew] == [0] * 4
    for before, turn in pairwise(kept[:3]):
        assert turn["cached"] >= before["prompt_tokens"]
    assert kept[3]["cached"] == 0 and kept[3]["ids"] == kept[0]["ids"]


@pytest.mark.slow
def test_a_changed_transcript_takes_back_what_the_cache_has(model: TextModel) -> None:
    settings = Settings(max_new_tokens=5, sample=False)
    talked = Conversation(model, settings)
    talked.say("w1 w2")
    talked.messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    changed = talked.say("w9")
    fresh = Conversation(model, settings)
    fresh.messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    assert changed.ids == fresh.say("w9").ids
    assert 0 < changed.cached < changed.prompt_tokens - 1


@pytest.mark.slow
def test_text_is_printed_and_commands_are_not_said(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = turns(capsys, monkeypatch, base, LINES[:1])[0]["text"]
    outcome = chat(capsys, monkeypatch, base, (LINES[0], "", "/help", "/reset", LINES[0], "/exit", "w9"))
    assert outcome.status == 0 and outcome.out == f"{expected}\n{expected}\n"
    assert outcome.err.count("tokens/s") == 1


def test_the_system_speaks_first(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (LINES[0], "/reset", LINES[0])
    answers = turns(capsys, monkeypatch, base, lines, "--system", "w20 w21")
    longer = turns(capsys, monkeypatch, base, LINES[:1])[0]["prompt_tokens"] + 4
    assert [turn["prompt_tokens"] for turn in answers] == [longer, longer]


@pytest.mark.full
def test_an_interrupt_stops_an_answer_and_not_the_conversation(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from graftc.cli.commands.chat import _turn

    talked = Conversation(model, Settings(max_new_tokens=40, sample=False))
    heard: list[str] = []

    def hear(text: str) -> None:
        heard.append(text)
        if len(heard) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with heard_interrupts():
        turn = _turn(talked, "w1", hear)
    assert turn.finish == "interrupted" and len(turn.ids) < 10 and "".join(heard) == turn.text
    assert talked.messages[-1] == {"role": "assistant", "content": turn.text}
    assert _turn(talked, "w2", lambda _: None).finish == "length"


@pytest.mark.slow
def test_who_cannot_chat(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer(save_model(tmp_path / "silent"), None)
    outcome = chat(capsys, monkeypatch, tmp_path / "silent", LINES)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("GC147: the model's tokenizer has no chat template\n  hint: ")
    save_tokenizer(save_model(tmp_path / "bert", "bert"))
    assert chat(capsys, monkeypatch, tmp_path / "bert", LINES, "--json").data["error"]["code"] == "GC142"
    save_tokenizer(save_model(tmp_path / "small", max_position_embeddings=16))
    outcome = chat(capsys, monkeypatch, tmp_path / "small", (*LINES, *LINES))
    assert outcome.status == 3 and outcome.err.splitlines()[-2].startswith("GC031: the prompt has ")
    assert "/reset" in outcome.err.splitlines()[-1]
