"""Tokenizers, chat templates and generation settings of others give transformers' results, or a coded error in time."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.applications.chat.answering import answer, prompt_ids
from graftc.applications.chat.opening import TextModel, open_text_model, tokenizer_of
from graftc.applications.chat.templates import require_bounded
from graftc.records.applications.answers import Settings
from graftc.specs import GraftError
from tests.cli.speakers import TEMPLATE, save_model, save_tokenizer
from tests.kit.forks import fork

MESSAGES = [{"role": "user", "content": "w1 w2"}]
SECONDS = 4.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_model(tmp_path_factory.mktemp("speaking") / "base")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def opened(folder: Path) -> TextModel:
    require_bounded(TEMPLATE, MESSAGES, {})  # starts the process, which happens once
    model = open_text_model(folder)
    model.tokenizer.add_tokens(["abcdef"])  # makes transformers look where tokens begin
    return model


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder without weights, to be changed."""
    path = tmp_path / "model"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


@pytest.fixture
def in_time() -> Iterator[None]:
    began = time.process_time()
    yield
    assert time.process_time() - began < SECONDS


DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}"
BOMBS = {
    "doubled": DOUBLED,
    "doubled and dropped": DOUBLED.replace("{{ ns.x }}", "short"),
    "added": DOUBLED.replace("ns.x ~ ns.x", "ns.x + ns.x"),
    "repeated": "{{ 'ab' * 10000000000 }}",
    "centred": "{{ 'ab'|center(10000000000) }}",
    "formatted": "{{ '%10000000000d'|format(1) }}",
    "method": "{{ 'ab'.ljust(10000000000) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "long": "{% for i in range(99999) %}{% for j in range(999) %}text{% endfor %}{% endfor %}",
    "list": "{% set x = namespace(l=[1]) %}{% for i in range(60) %}{% set x.l = x.l + x.l %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "wrong": "{% for %}",
    "raises": "{{ raise_exception('no such role') }}",
    "forbidden": "{{ ''.__class__.__mro__ }}",
    "unknown": "{{ nothing.there }}",
    "divides": "{{ 1 / 0 }}",
}


@pytest.mark.usefixtures("in_time")
class TestTemplates:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", BOMBS)
    def test_what_is_too_much_or_wrong_is_refused(self, opened: TextModel, name: str) -> None:
        began = time.monotonic()
        before = opened.tokenizer.chat_template
        opened.tokenizer.chat_template = BOMBS[name]
        try:
            with pytest.raises(GraftError) as caught:
                prompt_ids(opened, MESSAGES)
        finally:
            opened.tokenizer.chat_template = before
        assert caught.value.code == "GC147" and len(str(caught.value)) < 2000
        assert time.monotonic() - began < 20

    @pytest.mark.parametrize(
        "template",
        [
            TEMPLATE,
            "{% for m in messages %}{% generation %}{{ m.content }} {% endgeneration %}{% endfor %}",
            "{% for m in messages %}{{ m['role'] }} {% if loop.last %}{% break %}{% endif %}{% endfor %}w1",
            "{{ eos_token }} {{ messages|tojson }} {{ strftime_now('%Y')|length }}",
            "{% set ns = namespace(n=0) %}{% for i in range(2000) %}{% set ns.n = ns.n + i %}{% endfor %}w{{ ns.n }}",
            "{{ dict(a=1)|length }} {{ messages[0].content * 500 }}",
            {"default": TEMPLATE, "tool_use": "other"},
        ],
    )
    def test_usual_ones_render_as_in_transformers(self, opened: TextModel, template: Any) -> None:
        before = opened.tokenizer.chat_template
        opened.tokenizer.chat_template = template
        try:
            wanted = opened.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
            assert prompt_ids(opened, MESSAGES)[0].tolist() == wanted["input_ids"]
        finally:
            opened.tokenizer.chat_template = before

    def test_long_conversations(self, opened: TextModel) -> None:
        many = [{"role": "user", "content": "w1 " * 100_000}] * 3
        require_bounded(TEMPLATE, many, {})

    @pytest.mark.slow
    def test_after_a_refusal_and_in_a_fork(self) -> None:
        with pytest.raises(GraftError):
            require_bounded(BOMBS["loops"], MESSAGES, {})
        require_bounded(TEMPLATE, MESSAGES, {})
        child = fork()
        if child == 0:
            status = 1
            try:
                require_bounded(TEMPLATE, MESSAGES, {})
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        require_bounded(TEMPLATE, MESSAGES, {})


REFUSED: dict[str, dict[str, object]] = {
    "a temperature of 0": {"do_sample": True, "temperature": 0.0},
    "a negative temperature": {"do_sample": True, "temperature": -1.0},
    "a temperature of text": {"do_sample": True, "temperature": "hot"},
    "top_k of text": {"do_sample": True, "top_k": "many"},
    "a million beams": {"num_beams": 1_000_000},
    "beams of text": {"num_beams": "four"},
    "half a beam": {"num_beams": 1.5},
    "no beams": {"num_beams": 0},
    "a million texts": {"do_sample": True, "num_return_sequences": 1_000_000},
    "a negative penalty": {"repetition_penalty": -2.0},
    "a penalty of text": {"repetition_penalty": "hard"},
    "an end of text": {"eos_token_id": "</s>"},
    "ends of texts": {"eos_token_id": ["</s>"]},
    "half an end": {"eos_token_id": 1.5},
    "a huge end": {"eos_token_id": 2**70},
    "padding of text": {"pad_token_id": "x"},
    "stops of numbers": {"stop_strings": [1, 2]},
    "stops of nothing": {"stop_strings": []},
    "many stops": {"stop_strings": ["a"] * 1000},
    "a long stop": {"stop_strings": "a" * 100_000},
    "bad words of text": {"bad_words_ids": "no"},
    "a cache of another kind": {"cache_implementation": "quick"},
    "forced beyond the words": {"forced_eos_token_id": 10**9},
    "n-grams of text": {"no_repeat_ngram_size": "two"},
    "suppressed beyond the words": {"suppress_tokens": ["a"]},
    "constraints": {"force_words_ids": [[1]]},
}


def set_config(model: TextModel, patch: pytest.MonkeyPatch, values: dict[str, object]) -> None:
    from transformers import GenerationConfig

    config: Any = GenerationConfig(eos_token_id=0, pad_token_id=2)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(config, name, value)
    patch.setattr(model.source, "generation_config", config)


@pytest.mark.usefixtures("in_time")
class TestSettings:
    @pytest.mark.parametrize("name", REFUSED)
    def test_what_does_not_work_has_a_code(self, opened: TextModel, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        set_config(opened, monkeypatch, REFUSED[name])
        with pytest.raises(GraftError) as caught:
            answer(opened, prompt_ids(opened, "w1 w2"), Settings(max_new_tokens=3))
        assert caught.value.code == "GC148" and len(str(caught.value)) < 2000

    @pytest.mark.parametrize(
        "values",
        [
            {"stop_strings": ["w7"]},
            {"stop_strings": "w7"},
            {"num_beams": 3},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
            {"eos_token_id": [0, 5]},
            {"bad_words_ids": [[7], [8, 9]], "min_new_tokens": 2},
            {"temperature": 0.0},
            {"max_length": 10**12},
            {"return_dict_in_generate": True, "output_scores": True},
        ],
    )
    def test_what_works_is_as_in_transformers(
        self, opened: TextModel, values: dict[str, object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        set_config(opened, monkeypatch, values)
        ids = prompt_ids(opened, "w1 w2")
        given: dict[str, Any] = {"max_new_tokens": 6, "tokenizer": opened.tokenizer, "use_cache": True}
        with torch.no_grad():
            wanted = opened.source.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)
        wanted = wanted if isinstance(wanted, torch.Tensor) else wanted.sequences
        assert answer(opened, ids, Settings(max_new_tokens=6)).ids == tuple(wanted[0, ids.shape[1] :].tolist())

    def test_beams_of_the_user(self, opened: TextModel) -> None:
        with pytest.raises(GraftError) as caught:
            answer(opened, prompt_ids(opened, "w1"), Settings(max_new_tokens=3, num_beams=10**6))
        assert caught.value.code == "GC148"


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _charsmap(text: str) -> Callable[[Path], None]:
    normalizer = {"type": "Precompiled", "precompiled_charsmap": text}
    return lambda folder: _edit(folder / "tokenizer.json", lambda data: data.update(normalizer=normalizer))


def _pipe(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def _sparse(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(2**36)

    return make


TOKENIZERS: dict[str, Callable[[Path], object]] = {
    "a bad charsmap": _charsmap("/////w=="),
    "an empty charsmap": _charsmap(""),
    "a short charsmap": _charsmap("YWJj"),
    "deep": lambda folder: (folder / "tokenizer.json").write_text("[" * 100_000),
    "deep config": lambda folder: (folder / "tokenizer_config.json").write_text('{"a":' * 100_000),
    "nothing": lambda folder: (folder / "tokenizer.json").write_text(""),
    "not text": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"),
    "a list": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "class is a number": lambda folder: _edit(
        folder / "tokenizer_config.json", lambda data: data.update(tokenizer_class=5)
    ),
    "a pipe": _pipe("tokenizer.json"),
    "a pipe beside": _pipe("special_tokens_map.json"),
    "a pipe for the template": _pipe("chat_template.jinja"),
    "a huge file": _sparse("tokenizer.json"),
    "a huge config": _sparse("tokenizer_config.json"),
    "a huge template": _sparse("chat_template.jinja"),
}


@pytest.mark.usefixtures("in_time")
class TestTokenizers:
    @pytest.mark.parametrize("name", TOKENIZERS)
    def test_what_cannot_be_read_has_a_code(self, changed: Path, name: str) -> None:
        TOKENIZERS[name](changed)
        with pytest.raises(GraftError) as caught:
            tokenizer_of(str(changed), [])
        assert caught.value.code == "GC146" and len(str(caught.value)) < 2000

    def test_a_charsmap_that_fails_later(self, opened: TextModel, changed: Path) -> None:
        _charsmap("BAAAAGFiY2Q=")(changed)
        before = opened.tokenizer
        object.__setattr__(opened, "tokenizer", tokenizer_of(str(changed), []))
        try:
            with pytest.raises(GraftError) as caught:
                prompt_ids(opened, "w1 é")
        finally:
            object.__setattr__(opened, "tokenizer", before)
        assert caught.value.code == "GC146"
