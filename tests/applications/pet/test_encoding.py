"""Rows encoded in patterns: tokens of the filled text, cut in fields only, and blanks that data cannot write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer

from graftc.applications.demo.data import find_model
from graftc.applications.pet.encoding import IGNORED, ClozeEncoder
from graftc.applications.pet.plain import PlainEncoder
from graftc.applications.pet.truncation import shortened_counts
from graftc.specs.pet.io import load_pet_spec
from graftc.specs.pet.pattern import PatternSpec
from graftc.specs.pet.verbalizer import Verbalizer
from tests.applications.pet.small_tokenizers import KINDS, tokenizer
from tests.kit.refusals import refused

WORDS = Verbalizer({"good": "great", "bad": "terrible"})
BLANKS = {"wordpiece": "[MASK]", "roberta": "<mask>", "t5": "<extra_id_0>"}
TEXTS = [
    "",
    "{text} It was {blank}.",
    "{blank}! {text}",
    "({text}) and {title}: it was {blank}",
    "{text}.{title} {blank}",
]
ALPHABET = st.sampled_from([*"abcdefghij .,!?()\n\t'\"-_:ÄßçЖ中😀\x00\u00a0\u0301", " great", " hockey ", "The ", "  "])
FIELDS = st.lists(ALPHABET, max_size=30).map("".join)


def pattern_of(text: str, name: str = "p") -> PatternSpec:
    return PatternSpec(name=name, text=text)


def encoder(kind: str, text: str, length: int = 256, words: Verbalizer = WORDS, **more: Any) -> ClozeEncoder:
    return ClozeEncoder([pattern_of(text)], [words], tokenizer(kind), length, **more)


def shown(batch: dict[str, Tensor], row: int = 0) -> list[int]:
    """Return the tokens of a row that the attention mask shows."""
    return [int(i) for i in batch["input_ids"][row][batch["attention_mask"][row].bool()]]


def written(kind: str, text: str, row: dict[str, str]) -> str:
    """Return the pattern filled with the row, and the blank as the tokenizer writes it."""
    if KINDS[kind] == "last":
        assert text.endswith("{blank}")
        return text.removesuffix("{blank}").format(**row).rstrip()
    return text.format(**row, blank=BLANKS[kind])


@pytest.mark.parametrize("kind", KINDS)
@given(row=st.fixed_dictionaries({"text": FIELDS, "title": FIELDS}), text=st.sampled_from(TEXTS[1:]))
@settings(max_examples=40, deadline=None)
def test_tokens_are_those_of_the_filled_text(kind: str, row: dict[str, str], text: str) -> None:
    if KINDS[kind] == "last":
        text = text if text.endswith("{blank}") else "{text} and {title} it was {blank}"
    batch = encoder(kind, text).encode([row], 0)
    expected = tokenizer(kind)(written(kind, text, row))
    ids = list(expected["input_ids"])
    if kind == "llama":  # a text that continues has no token at its end
        ids.pop()
    assert shown(batch) == ids
    if "token_type_ids" in expected:
        assert batch["token_type_ids"].tolist() == [expected["token_type_ids"]]
    else:
        assert batch.keys() == {"input_ids", "attention_mask"}


@pytest.mark.slow
@pytest.mark.sample("roberta", "gpt2", "t5")
@pytest.mark.parametrize("kind", KINDS)
@given(text=FIELDS, title=FIELDS, length=st.integers(14, 40))
@settings(max_examples=40, deadline=None)
def test_only_fields_are_cut_and_at_their_ends(kind: str, text: str, title: str, length: int) -> None:
    pattern = "({title}) {text} It was {blank}"
    cloze = encoder(kind, pattern, length)
    whole = encoder(kind, pattern, 10_000)
    batch = cloze.encode([{"text": text, "title": title}], 0)
    ids = shown(batch)
    assert len(ids) <= length
    uncut = shown(whole.encode([{"text": text, "title": title}], 0))
    if len(uncut) <= length:
        assert ids == uncut
        return
    # Some beginnings of the fields fill the pattern with exactly these tokens.
    beginnings = ({"text": text[:i], "title": title[:k]} for i in range(len(text) + 1) for k in range(len(title) + 1))
    assert any(shown(whole.encode([row], 0)) == ids for row in beginnings)


@given(counts=st.lists(st.integers(0, 40), max_size=5), surplus=st.integers(0, 150))
def test_the_longest_is_shortened_first(counts: list[int], surplus: int) -> None:
    left = list(counts)
    for _ in range(min(surplus, sum(counts))):
        longest = max(left)
        left[max(i for i, count in enumerate(left) if count == longest)] -= 1
    assert shortened_counts(counts, surplus) == left


def test_a_long_field_is_cut_and_a_short_one_is_whole() -> None:
    cloze = encoder("wordpiece", "{title}: {text} {blank}", 20)
    batch = cloze.encode([{"title": "space and hockey", "text": "great " * 1_000}, {"title": "no", "text": "bad"}], 0)
    words = tokenizer("wordpiece").convert_ids_to_tokens(shown(batch))
    assert words == ["[CLS]", "space", "and", "hockey", ":", *["great"] * 13, "[MASK]", "[SEP]"]
    assert shown(batch, 1) == tokenizer("wordpiece")("no: bad [MASK]")["input_ids"]
    assert batch["input_ids"].shape == (2, 20) and batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"][1, 6:].tolist() == [0] * 14 and batch["attention_mask"][1].sum() == 6


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_data_are_text(kind: str) -> None:
    own = tokenizer(kind)
    pattern = "[{text}] <{text}> {title} {blank}"
    cloze = encoder(kind, pattern)
    plain = shown(cloze.encode([{"text": "x", "title": "y"}], 0))
    specials = [
        *own.all_special_tokens,
        "<extra_id_0>",
        "\ue000",
        "a\ue000b",
        "MASK",
        "mask",
        "extra_id_0",
        "/s",
        "\uff1c/s\uff1e",
    ]
    for special in specials:
        for text in (special, f" {special} ", special * 3, special.upper()):
            ids = shown(cloze.encode([{"text": text, "title": special}], 0))
            for number in {*own.all_special_ids, *own.added_tokens_decoder} - {own.unk_token_id}:
                assert ids.count(number) == plain.count(number), (special, text)


def test_words_are_as_they_stand_in_the_pattern() -> None:
    ids_of = tokenizer("roberta").convert_tokens_to_ids
    behind = encoder("roberta", "{text} It was {blank}.").options()
    words = Verbalizer({"good": "The", "bad": "It"})
    first = encoder("roberta", "{blank} {text}", words=words).options()
    glued = encoder("roberta", "{text} ({blank})", words=Verbalizer({"good": "yes", "bad": ".", "more": ":"})).options()
    assert behind == {
        "blank": ids_of("<mask>"),
        "labels": ["good", "bad"],
        "verbalizers": [[[[ids_of("Ġgreat")]], [[ids_of("Ġterrible")]]]],
    }
    assert first["verbalizers"] == [[[[ids_of("The")]], [[ids_of("It")]]]]
    assert glued["verbalizers"][0][0] == [[ids_of("yes")]]
    last = encoder("gpt2", "{text} It was {blank}").options()
    own = tokenizer("gpt2").convert_tokens_to_ids
    assert last["blank"] == "last" and last["verbalizers"] == [[[[own("Ġgreat")]], [[own("Ġterrible")]]]]
    pieces = tokenizer("llama").convert_tokens_to_ids
    assert encoder("llama", "{text} It was {blank}").options()["verbalizers"][0][0] == [[pieces("▁great")]]


def test_a_sentinel_is_the_blank_of_t5() -> None:
    own = tokenizer("t5").convert_tokens_to_ids
    words = Verbalizer({"good": ["about", "space"], "bad": "hockey"})
    options = encoder("t5", "{text} It was {blank}.", words=words).options()
    assert "blank" not in options and options["decoder"] == [own("<pad>"), own("<extra_id_0>")]
    assert options["verbalizers"] == [[[[own("▁about")], [own("▁space")]], [[own("▁hockey")]]]]
    assert encoder("t5", "{text} It was {blank}.", words=words, start=7).options()["decoder"][0] == 7


def test_several_blanks_take_words_of_as_many_tokens() -> None:
    words = Verbalizer({"good": "great space", "bad": ["bad team", "no game"]})
    cloze = encoder("wordpiece", "{text} It was {blank} {blank}.", words=words)
    ids_of = tokenizer("wordpiece").convert_tokens_to_ids
    wanted = [[ids_of(["great", "space"])], [ids_of(["bad", "team"]), ids_of(["no", "game"])]]
    assert cloze.options()["verbalizers"] == [wanted]
    ids = shown(cloze.encode([{"text": "x [MASK]"}], 0))
    assert ids.count(ids_of("[MASK]")) == 2


def test_one_verbalizer_where_all_words_are_the_same_tokens() -> None:
    own = Verbalizer({"good": "good", "bad": "bad"})
    patterns = [
        pattern_of("{text} It was {blank}.", "a"),
        pattern_of("{text} {blank}", "b"),
        pattern_of("{blank} {text}", "c"),
    ]
    cloze = ClozeEncoder(patterns, [WORDS, WORDS, own], tokenizer("wordpiece"))
    assert len(cloze.options([0, 1])["verbalizers"]) == 1
    assert len(cloze.options()["verbalizers"]) == 3
    both = cloze.options([2, 0])["verbalizers"]
    assert both == [cloze.options([2])["verbalizers"][0], cloze.options([0])["verbalizers"][0]]
    assert cloze.labels == ("good", "bad")


def test_each_row_may_have_its_own_pattern() -> None:
    patterns = [pattern_of("{text} It was {blank}.", "a"), pattern_of("{blank}: {text}", "b")]
    cloze = ClozeEncoder(patterns, [WORDS, WORDS], tokenizer("wordpiece"))
    rows = [{"text": "good game"}, {"text": "bad"}, {"text": ""}]
    mixed = cloze.encode(rows, [1, 0, 1])
    for number, own in enumerate([1, 0, 1]):
        assert shown(mixed, number) == shown(cloze.encode([rows[number]], own))


@pytest.mark.parametrize(
    ("kind", "text", "words", "said"),
    [
        (
            "wordpiece",
            "{text} {blank}",
            {"a": "great", "b": "hockeys"},
            "'hockeys' is 2 tokens, for the 1 blank",
        ),
        (
            "wordpiece",
            "{text} {blank} {blank}",
            {"a": "great", "b": "bad team"},
            "'great' is 1 token, for the 2 blanks",
        ),
        ("wordpiece", "{text} {blank}", {"a": "great", "b": "中"}, "does not have the word '中'"),
        ("wordpiece", "{text} {blank}", {"a": "great", "b": "[MASK]"}, "'[MASK]' is"),
        ("wordpiece", "{text} {blank}", {"a": "great", "b": "Great"}, "'a' and 'b' are the same tokens"),
        ("roberta", "{text} ({blank})", {"a": "yes", "b": "hockey"}, "'hockey' is"),
    ],
)
def test_words_that_do_not_fill_the_blanks(kind: str, text: str, words: dict[str, str], said: str) -> None:
    error = refused(lambda: encoder(kind, text, words=Verbalizer(words)))
    assert error.code == "GC178" and said in error.message


def test_close_words_are_offered() -> None:
    error = refused(lambda: encoder("wordpiece", "{text} {blank}", words=Verbalizer({"a": "greatt", "b": "bad"})))
    assert error.hint == "use a word of one token, such as 'great'"


@pytest.mark.parametrize("kind", ["wordpiece", "t5", "roberta"])
@pytest.mark.parametrize("word", ["spacehockey", "space hockey", "space-hockey", "spaceXhockey"])
def test_words_within_a_word_are_offered_first(kind: str, word: str) -> None:
    words = Verbalizer({"a": word, "b": "yes"})
    error = refused(lambda: encoder(kind, "{text} {blank}", words=words))
    assert error.code == "GC178" and error.hint.startswith("use a word of one token, such as 'hockey', 'space'")


@pytest.mark.parametrize("slots", [["text"], ["text", "title"]])
def test_a_plain_encoder_leaves_the_tokenizer_as_it_is(slots: list[str]) -> None:
    own = tokenizer("wordpiece")
    before = own.backend_tokenizer.to_str()
    batch = PlainEncoder(slots, own, 10).encode([{"text": "great " * 99, "title": "no"}, {"text": "", "title": "bad"}])
    assert batch["input_ids"].shape == (2, 10)
    assert own.backend_tokenizer.to_str() == before and own.backend_tokenizer.truncation is None


@pytest.mark.parametrize(
    ("kind", "text", "length", "said"),
    [
        (
            "wordpiece",
            "{text} It was {blank}, or was it good or bad?",
            12,
            "has 13 tokens even before a row is filled in, but the limit is 12",
        ),
        ("wordpiece", "[SEP] {text} {blank}", 64, "contains the special token '[SEP]'"),
        ("gpt2", "{text} It was {blank}.", 64, "does not end in its only blank"),
        ("gpt2", "{text} {blank} {blank}", 64, "does not end in its only blank"),
        ("t5", "{text} {blank} {blank}", 64, "has 2 blanks"),
    ],
)
def test_patterns_that_do_not_fit(kind: str, text: str, length: int, said: str) -> None:
    error = refused(lambda: encoder(kind, text, length))
    assert error.code == "GC179" and said in error.message


def test_models_have_their_own_bounds() -> None:
    cloze = encoder("wordpiece", "{text} {blank}", positions=10)
    assert cloze.max_length == 10 and len(shown(cloze.encode([{"text": "great " * 99}], 0))) == 10
    error = refused(lambda: encoder("gpt2", "{text} {blank}", blank="mask"))
    assert error.code == "GC179" and "no mask token" in error.message


def test_rows_without_a_field() -> None:
    cloze = encoder("wordpiece", "{text} It was {blank}.")
    rows: list[Any] = [{"text": "a"}, {"txt": "a", "label": "b"}]
    for call in (lambda: cloze.encode(rows, 0), lambda: cloze.check(rows)):
        error = refused(call)
        assert (error.code, error.hint) == ("GC180", "did you mean 'txt'?")
        assert error.message == "row 2 has no field 'text', which the pattern 'p' uses"
    rows[1] = {"text": None}
    assert refused(lambda: cloze.check(rows)).message == "row 2 has null for 'text', which is not text"
    nothing = encoder("gpt2", "{text}{blank}", words=Verbalizer({"a": "yes", "b": "."}))
    assert refused(lambda: nothing.encode([{"text": " "}], 0)).code == "GC180"


@pytest.mark.parametrize("kind", ["wordpiece", "roberta"])
@given(seed=st.integers(0, 2**32), texts=st.lists(FIELDS, min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_masked_tokens(kind: str, seed: int, texts: list[str]) -> None:
    own = tokenizer(kind)
    cloze = encoder(kind, "{text} It was {blank}.")
    rows = [{"text": text} for text in texts]
    plain = cloze.encode(rows, 0)
    batch = cloze.token_batch(rows, 0, torch.Generator().manual_seed(seed))
    again = cloze.token_batch(rows, 0, torch.Generator().manual_seed(seed))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch.keys() == plain.keys() | {"token_targets"}
    labels, ids = batch["token_targets"], plain["input_ids"]
    counted = labels != IGNORED
    assert counted.any()
    assert torch.equal(labels[counted], ids[counted]) and torch.equal(batch["input_ids"][~counted], ids[~counted])
    special = torch.tensor(own.all_special_ids)
    assert not torch.isin(ids[counted], special).any()
    changed = batch["input_ids"][counted]
    assert not torch.isin(changed[changed != own.mask_token_id], special).any()


def test_shares_of_masked_tokens() -> None:
    cloze = encoder("wordpiece", "{text} It was {blank}.")
    rows = [{"text": "great game " * 100}] * 40
    plain = cloze.encode(rows, 0)["input_ids"]
    batch = cloze.token_batch(rows, 0, torch.Generator().manual_seed(0))
    counted = batch["token_targets"] != IGNORED
    assert counted.float().mean().item() == pytest.approx(0.15, abs=0.02)
    now = batch["input_ids"][counted]
    assert (now == 4).float().mean().item() == pytest.approx(0.8, abs=0.04)
    assert (now == plain[counted]).float().mean().item() == pytest.approx(0.1, abs=0.03)


def test_the_auxiliary_loss_of_other_models() -> None:
    cloze = encoder("llama", "{text} It was {blank}", words=Verbalizer({"a": "good", "b": "bad"}))
    rows = [{"text": "the game"}, {"text": "no"}]
    batch = cloze.token_batch(rows, 0, torch.Generator())
    special = torch.isin(batch["input_ids"], torch.tensor([0, 1, 2]))
    assert torch.equal(batch["token_targets"], batch["input_ids"].masked_fill(special, IGNORED))
    words = Verbalizer({"a": "about", "b": "hockey"})
    t5 = encoder("t5", "{text} {blank}", words=words)
    assert not t5.has_token_loss
    assert refused(lambda: t5.token_batch(rows, 0, torch.Generator())).code == "GC179"


@pytest.mark.slow
def test_a_real_tokenizer() -> None:
    own = AutoTokenizer.from_pretrained(find_model())
    before = own.backend_tokenizer.to_str()
    spec = load_pet_spec(
        {
            "patterns": ["{text} This text is about {blank}.", {"name": "topic", "text": "Topic: {blank}. {text}"}],
            "verbalizer": {"space": ["space", "nasa"], "hockey": "hockey"},
            "training": {"max_length": 24},
        }
    )
    cloze = ClozeEncoder.of(spec, own)
    assert cloze.max_length == 24 and ClozeEncoder.of(spec, own, 48).max_length == 48
    verbalizers = [[[[2686], [9274]], [[3873]]]]
    assert cloze.options() == {"blank": 103, "labels": ["space", "hockey"], "verbalizers": verbalizers}
    batch = cloze.encode([{"text": "A [MASK] of it"}, {"text": "Unbelievable words " * 99}], [0, 1])
    text = "a [ mask ] of it this text is about [MASK]."
    assert own.decode(shown(batch)) == f"[CLS] {text} [SEP]"
    assert own.decode(shown(batch, 1)).startswith("[CLS] topic : [MASK]. unbelievable words")
    assert batch["input_ids"].shape == (2, 24)
    error = refused(lambda: encoder_of(own, {"a": "Baseballs", "b": "hockey"}))
    assert error.code == "GC178" and "'baseball'" in error.hint
    assert own.backend_tokenizer.to_str() == before


def encoder_of(own: Any, words: dict[str, str]) -> ClozeEncoder:
    return ClozeEncoder([pattern_of("{text} {blank}")], [Verbalizer(words)], own)
