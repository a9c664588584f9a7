"""``graftc generate`` gives the answers of the model's own ``generate``, whatever kind of folder it reads."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.cli.interrupts import Stop, interrupts
from graftc.runtime.sources.models import load_model, quiet_transformers
from tests.cli.speakers import WORDS, heard_interrupts, save_artifact, save_model, save_tokenizer
from tests.cli.support import run_here, run_valid

PROMPT = "w3 w1 w4 w1 w5"
COUNT = 12


@dataclass(frozen=True)
class Places:
    """Folders, and the compiled model of the artifact."""

    base: Path
    artifact: Path
    compiled: Any


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    folder = tmp_path_factory.mktemp("speaking")
    base = save_model(folder / "base")
    save_tokenizer(base)
    return Places(base, folder / "artifact", save_artifact(folder / "artifact", base))


def said(model: Any, prompt: str = PROMPT, **options: Any) -> str:
    """Return transformers' answer to a prompt, as words."""
    ids = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
    given = {"max_new_tokens": COUNT, "do_sample": False, "eos_token_id": 0, "pad_token_id": 2, **options}
    with torch.no_grad(), quiet_transformers():
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)[0, ids.shape[1] :]
    return " ".join(WORDS[n] for n in new.tolist() if 2 < n < len(WORDS))


def words(text: str) -> str:
    return " ".join(text.split())


def run(capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> str:
    outcome = run_here(capsys, "generate", str(folder), "-n", str(COUNT), *options)
    assert outcome.status == 0, outcome.err
    assert "tokens/s" in outcome.err.splitlines()[-1]
    return outcome.out


@pytest.mark.full
def test_a_folder_of_transformers(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_model(str(places.base))
    expected = said(base)
    assert len(expected.split()) > 5
    assert words(run(capsys, places.base, "-p", PROMPT)) == expected
    other = "w7 w8"
    assert said(base, other) != expected
    two = run(capsys, places.base, "-p", PROMPT, "-p", other).split("\n\n")
    assert [words(text) for text in two] == [expected, said(base, other)]
    assert words(run(capsys, places.base, "-p", PROMPT, "--num-beams", "3")) == said(base, num_beams=3)
    assert words(run(capsys, places.base, "-p", PROMPT, "--no-cache")) == expected


@pytest.mark.full
def test_an_artifact_a_bank_and_the_base(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    alone = {name: said(places.compiled.fix(name).merge().to_transformers()) for name in ("one", "two")}
    base = said(load_model(str(places.base)))
    assert len({*alone.values(), base}) == 3
    for name, expected in alone.items():
        data = run_valid(
            capsys, "generate", str(places.artifact), "-p", PROMPT, "-n", str(COUNT), "--adapter", name, "--greedy"
        )
        (answer,) = data["answers"]
        assert words(answer["text"]) == expected and data["adapter"] == name and data["kind"] == "artifact"
        assert (answer["prompt"], answer["prompt_tokens"]) == (PROMPT, 5)
        assert answer["new_tokens"] == len(answer["ids"]) == COUNT and answer["finish"] == "length"
        assert 0 < answer["first_token_seconds"] <= answer["seconds"] and answer["tokens_per_second"] > 0
    assert words(run(capsys, places.artifact, "-p", PROMPT, "--base")) == base


@pytest.mark.slow
def test_a_merged_folder(places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged = places.compiled.fix("two").merge()
    merged.save(tmp_path / "merged")
    assert words(run(capsys, tmp_path / "merged", "-p", PROMPT)) == said(merged.to_transformers())


@pytest.mark.slow
def test_prompts_from_files(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(capsys, places.base, "-p", PROMPT)
    file = tmp_path / "prompts.txt"
    file.write_text(f"{PROMPT}\n\nw7 w8\n", encoding="utf-8")
    both = run(capsys, places.base, "-p", PROMPT, "-p", "w7 w8")
    assert run(capsys, places.base, "--file", str(file), "--lines") == both
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n"))
    assert run(capsys, places.base) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n"))
    assert run(capsys, places.base, "--file", "-") == expected


@pytest.mark.slow
def test_drawing(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [run(capsys, places.base, "-p", PROMPT, "-t", "3.5", "--seed", str(seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = run(capsys, places.base, "-p", PROMPT, "--greedy")
    assert run(capsys, places.base, "-p", PROMPT, "--top-k", "1") == greedy
    assert run(capsys, places.base, "-p", PROMPT, "--temperature", "0") == greedy
    with_top_p = [run(capsys, places.base, "-p", PROMPT, "--top-p", "1e-9", "--seed", seed) for seed in ("1", "2")]
    assert with_top_p == [greedy, greedy]


@pytest.mark.slow
def test_a_chat_template(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(capsys, places.base, "-p", f"system: w9 </s> user: {PROMPT} </s> assistant:")
    assert run(capsys, places.base, "--chat", "--system", "w9", "-p", PROMPT) == plain
    assert run(capsys, places.base, "--chat", "-p", PROMPT) != plain


def test_an_answer_ends_with_its_token_or_its_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = save_model(tmp_path / "small", max_position_embeddings=8)
    save_tokenizer(small)
    (answer,) = run_valid(capsys, "generate", str(small), "-p", PROMPT, "-n", "20")["answers"]
    assert (answer["new_tokens"], answer["finish"]) == (3, "length")
    error = run_valid(capsys, "generate", str(small), "-p", f"{PROMPT} w1 w1 w1", status=3)["error"]
    assert error["code"] == "GC031" and "8 tokens" in error["message"] and "8 positions" in error["message"]


WRONG = {
    ("nothing",): (3, "GC032", "there is no folder"),
    ("bsae",): (3, "GC032", "did you mean 'base'?"),
    ("empty",): (3, "GC032", "no config.json"),
    ("bert",): (2, "GC142", "BertForSequenceClassification does not generate"),
    ("mute",): (3, "GC146", "there is no tokenizer in 'mute'"),
    ("mute", "--tokenizer", "empty"): (3, "GC146", "there is no tokenizer in 'empty'"),
    ("narrow",): (3, "GC146", "the model has only 4 tokens"),
    ("onnx",): (3, "GC144", "config.json in"),
    ("base", "--base"): (2, "GC090", "no base beside it"),
    ("base", "--adapter", "one"): (2, "GC091", "no bank"),
    ("artifact", "--adapter", "tow"): (2, "GC038", "did you mean 'two'?"),
    ("artifact", "--adapter", "two", "--base"): (2, "GC090", "--adapter"),
    ("base", "--model", "base"): (2, "GC090", "leave out --model"),
    ("base", "--device", "abacus"): (2, "GC090", "there is no device 'abacus'"),
    ("base", "--greedy", "--top-k", "3"): (2, "GC090", "leave out --top-k"),
    ("base", "--sample", "-t", "0"): (2, "GC090", "which contradicts --sample"),
    ("base", "--system", "w1"): (2, "GC090", "add --chat"),
    ("base", "--lines"): (2, "GC090", "leave out --lines"),
    ("silent", "--chat"): (2, "GC147", "no chat template"),
    ("strict", "--chat", "--system", "w1"): (2, "GC147", "does not accept messages with the roles system, user"),
}


@pytest.fixture(scope="module")
def wrong(places: Places, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that cannot generate."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "base").symlink_to(places.base)
    (folder / "artifact").symlink_to(places.artifact)
    (folder / "empty").mkdir()
    save_tokenizer(save_model(folder / "bert", "bert"))
    save_model(folder / "mute")
    save_tokenizer(save_model(folder / "narrow", vocab_size=4, pad_token_id=None, bos_token_id=None, eos_token_id=None))
    save_tokenizer(save_model(folder / "silent"), None)
    strict = "{{ raise_exception('only users') if messages[0].role != 'user' }}user: {{ messages[0].content }}"
    save_tokenizer(save_model(folder / "strict"), strict)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "onnx" / "model.onnx").touch()
    return folder


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_uses(
    arguments: tuple[str, ...], wrong: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wrong)
    status, code, told = WRONG[arguments]
    error = run_valid(capsys, "generate", *arguments, "-p", PROMPT, status=status)["error"]
    assert error["code"] == code and told in f"{error['message']} {error['hint']}"


def test_prompts_that_are_none(
    places: Places, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for given, told in (("gone.txt", "no such file"), ("latin.txt", "not UTF-8"), ("empty.txt", "no prompt")):
        outcome = run_here(capsys, "generate", str(places.base), "--file", str(tmp_path / given))
        assert outcome.status == 2 and outcome.err.startswith("GC090: ") and told in outcome.err
    for given in ("/dev/zero", "-"):
        with open("/dev/zero", encoding="utf-8") as endless:
            monkeypatch.setattr("sys.stdin", endless)
            outcome = run_here(capsys, "generate", str(places.base), "--file", given)
        assert outcome.status == 2 and "has more than 16,777,216 characters" in outcome.err
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    assert "missing option '--prompt'" in run_here(capsys, "generate", str(places.base)).err


def test_the_first_interrupt_asks_and_the_second_interrupts() -> None:
    stop = Stop()
    with heard_interrupts():
        before = signal.getsignal(signal.SIGINT)
        with interrupts(stop):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.asked
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
