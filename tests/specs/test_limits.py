"""Input beyond a limit raises a coded error at once: no hang, no raw exception, no message as large as the value."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from graftc.compiler.resolve.select import select
from graftc.specs import GraftError, LoRA, SiteKind, Spec, Target, load_spec, parse_spec
from graftc.specs.errors.text import printable, quoted, shown
from graftc.specs.patterns import expand_braces, glob_to_regex, measure_braces
from graftc.specs.regexes import RegexMatcher, check_regex
from graftc.specs.registry import method_specs
from graftc.specs.target import Candidate
from tests.kit.refusals import refused

Q = {"role": "attn.q"}
LORA = {"method": "lora", "target": Q}
SECONDS = 5.0


def in_short(make: Callable[[], Any]) -> GraftError:
    """Return the coded error that `make` raises; check that it comes in time and is short."""
    error = refused(make, seconds=SECONDS)
    assert len(str(error)) < 20_000
    assert printable(str(error)) == str(error)
    return error


def written(format: str, data: Any) -> str:
    """Return plain data as text in a format; flow YAML is JSON."""
    if format != "toml":
        return json.dumps(data)
    return f"adapt = {json.dumps(data['adapt']).replace(': ', ' = ')}"


DEEP = 10_000
TEXTS: dict[str, tuple[str, str]] = {
    "comment of 10 MB": ("yaml", "#" * 10_000_000),
    "comments": ("toml", "#\n" * 1_000_000),
    "flat list": ("yaml", "a: [" + "x," * 60_000 + "]"),
    "flat mapping": ("yaml", "a: {" + ",".join(f"k{i}: " for i in range(25_000)) + "}"),
    "json list": ("json", '{"a": [' + "1," * 60_000 + "1]}"),
    "yaml flow": ("yaml", "[" * DEEP),
    "yaml maps": ("yaml", "a: {" * DEEP),
    "yaml block": ("yaml", "\n".join(" " * i + "a:" for i in range(400))),
    "yaml dashes": ("yaml", "- " * DEEP),
    "json deep": ("json", '{"a":' * DEEP),
    "json closed": ("json", '{"a":' * 500 + "1" + "}" * 500),
    "toml arrays": ("toml", "a = " + "[" * DEEP),
    "toml tables": ("toml", "a = " + "{a = " * DEEP),
    "toml dots": ("toml", ".".join(["a"] * 20_000) + " = 1"),
    "toml spaced dots": ("toml", " . ".join(["a"] * 20_000) + " = 1"),
    "toml quoted dots": ("toml", ".".join(["a", *['"b"'] * 20_000]) + " = 1"),
    "toml heads": ("toml", "[" + ".".join(["a"] * 20_000) + "]"),
    "toml array heads": ("toml", "[[" + ".".join(["a"] * 20_000) + "]]"),
    "aliases": ("yaml", "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 40))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_too_large_or_too_deep(name: str) -> None:
    format, text = TEXTS[name]
    assert in_short(lambda: parse_spec(text, format=format)).code == "GC009"  # type: ignore[arg-type]


HUGE = "9" * 5_000
RAW: dict[str, tuple[str, str, str]] = {
    **{f"{f} decimal": (f, written(f, {"adapt": [{**LORA, "rank": 7}]}).replace("7", HUGE), c)
       for f, c in (("yaml", "GC009"), ("json", "GC009"), ("toml", "GC001"))},
    **{f"{f} negative": (f, written(f, {"adapt": [{**LORA, "rank": 7}]}).replace("7", f"-{HUGE}"), c)
       for f, c in (("yaml", "GC009"), ("json", "GC009"), ("toml", "GC001"))},
    "yaml hex": ("yaml", f"adapt: [{{method: lora, target: {{role: attn.q}}, rank: 0x{'f' * 5_000}}}]", "GC009"),
    "toml hex": ("toml", written("toml", {"adapt": [{**LORA, "rank": 7}]}).replace("7", f"0x{'f' * 5_000}"), "GC009"),
    "yaml float": ("yaml", "adapt: [{method: lora, target: {role: attn.q}, alpha: 1e999}]", "GC002"),
    "json float": ("json", written("json", {"adapt": [{**LORA, "alpha": 7}]}).replace("7", "1e999"), "GC002"),
    "toml float": ("toml", written("toml", {"adapt": [{**LORA, "alpha": 7}]}).replace("7", "1e999"), "GC002"),
    "yaml nan": ("yaml", "adapt: [{method: lora, target: {role: attn.q}, alpha: .nan}]", "GC002"),
    "json nan": ("json", '{"adapt": NaN}', "GC001"),
    "toml nan": ("toml", written("toml", {"adapt": [{**LORA, "alpha": 7}]}).replace("7", "nan"), "GC002"),
    "yaml key twice": ("yaml", "adapt: []\nadapt: []", "GC001"),
    "json key twice": ("json", '{"adapt": [], "adapt": []}', "GC001"),
    "toml key twice": ("toml", "adapt = []\nadapt = []", "GC001"),
    **{f"{f} tab": (f, "\tadapt:\n\t\t- x", c) for f, c in (("yaml", "GC001"), ("json", "GC001"), ("toml", "GC001"))},
    **{f"{f} NUL": (f, "adapt: [\0]", "GC001") for f in ("yaml", "json", "toml")},
    **{f"{f} control": (f, "adapt: [\x1b[31m]", "GC001") for f in ("yaml", "json", "toml")},
    **{f"{f} UTF-16": (f, "adapt: []".encode("utf-16-le").decode(), "GC001") for f in ("yaml", "json", "toml")},
    "yaml surrogate": ("yaml", 'adapt: [{method: "\\ud800"}]', "GC010"),
    "json surrogate": ("json", '{"adapt": [{"method": "\\ud800"}]}', "GC010"),
    "json surrogate key": ("json", '{"adapt": [{"\\udfff": 1}]}', "GC010"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_raw_exceptions_of_parsers_are_coded(name: str) -> None:
    format, text, code = RAW[name]
    assert in_short(lambda: parse_spec(text, format=format)).code == code  # type: ignore[arg-type]


@pytest.mark.parametrize("format", ["yaml", "json", "toml"])
def test_a_byte_order_mark_is_no_text(format: Any) -> None:
    assert parse_spec("\ufeff" + written(format, {"adapt": [LORA]}), format=format).adapt[0].method == "lora"


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"#" * 300_000, "GC009"),
        ("adapt: []".encode("utf-16"), "GC001"),
        ("adapt: []".encode("utf-32"), "GC001"),
        (b"adapt: [\xff\xfe]", "GC001"),
        (b"\xed\xa0\x80", "GC001"),
    ],
)
def test_bytes_that_are_no_spec(tmp_path: Any, suffix: str, content: bytes, code: str) -> None:
    path = tmp_path / f"spec{suffix}"
    path.write_bytes(content)
    assert in_short(lambda: load_spec(path)).code == code


def test_what_never_ends_is_not_read(tmp_path: Any) -> None:
    import os

    pipe, device = tmp_path / "pipe.yaml", tmp_path / "zero.yaml"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        assert in_short(lambda path=path: load_spec(path)).code == "GC006"


# --- in Python: data that no parser has checked -------------------------------------------------------------------


def _nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


_CYCLE: dict[str, Any] = {"adapt": []}
_CYCLE["adapt"].append(_CYCLE)
LONG = "x" * 10_000_000
DATA: dict[str, tuple[Any, str]] = {
    "deep": ({"adapt": _nested(5_000)}, "GC009"),
    "cycle": (_CYCLE, "GC009"),
    "a method of 10 MB": ({"adapt": [{"method": LONG}]}, "GC009"),
    "a key of 10 MB": ({LONG: 1, "adapt": []}, "GC009"),
    "an integer key": ({1: 2, "adapt": []}, "GC002"),
    "adaptations": ({"adapt": [LORA] * 1_001}, "GC002"),
    "adaptations and values": ({"adapt": [LORA] * 10_000}, "GC009"),
    "tokens": ({"adapt": [LORA], "tokens": {"add": [f"t{i}" for i in range(20_000)]}}, "GC009"),
    "more tokens than allowed": ({"adapt": [LORA], "tokens": {"add": [f"t{i}" for i in range(10_001)]}}, "GC002"),
    "tokens of a wrong type": ({"adapt": [LORA], "tokens": {"add": [3] * 9_000}}, "GC002"),
    "equal tokens": ({"adapt": [LORA], "tokens": {"add": [f"t{i}" for i in range(9_000)] + ["t1"]}}, "GC002"),
    "wrong adaptations": ({"adapt": [3] * 900}, "GC002"),
    "unknown methods": ({"adapt": [{"method": "l" * 190 + str(i)} for i in range(900)]}, "GC004"),
    "unknown fields": ({"adapt": [{**LORA, **{f"rank{i}": 1 for i in range(5_000)}}]}, "GC003"),
    "equal names": ({"adapt": [{**LORA, "name": "a"}] * 900}, "GC005"),
    "a long name": ({"adapt": [{**LORA, "name": "a" * 101}]}, "GC009"),
    "a name with a newline": ({"adapt": [{**LORA, "name": "a\n"}]}, "GC002"),
    "a name with a control": ({"adapt": [{**LORA, "name": "a\x1b[31m"}]}, "GC002"),
    "members": ({"adapt": [LORA], "compose": {"stack": [f"m{i}" for i in range(9_000)]}}, "GC091"),
    "compositions": ({"adapt": [LORA], "compose": [{"stack": ["a", "b"]}] * 1_001}, "GC002"),
    "patterns": ({"adapt": [{**LORA, "target": {"modules": ["{a,b}" * 9 + f"{i}" * 9 for i in range(900)]}}]}, "GC009"),
    "regexes": ({"adapt": [{**LORA, "target": {"regex": ["(a{90}){9}" + "b" * i for i in range(90)]}}]}, "GC009"),
    "roles": ({"adapt": [{**LORA, "target": {"role": "attn.{" + "q," * 400 + "zz}"}}]}, "GC012"),
    "a layer": ({"adapt": [{**LORA, "target": {**Q, "layers": HUGE}}]}, "GC009"),
    "a slice": ({"adapt": [{**LORA, "target": {**Q, "layers": f"{'9' * 900}:"}}]}, "GC002"),
    "a layer in Arabic digits": ({"adapt": [{**LORA, "target": {**Q, "layers": "٣"}}]}, "GC002"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA)
def test_data_that_is_too_large(name: str) -> None:
    data, code = DATA[name]
    assert in_short(lambda: load_spec(data)).code == code


@pytest.mark.parametrize("bits", [62, 63, 70, 20_000])
def test_sizes_have_a_bound_in_every_method(bits: int) -> None:
    for entry in method_specs().values():
        for name, info in entry.spec_class.model_fields.items():
            if info.annotation not in (int, int | None):
                continue
            for sign in (1, -1):
                with pytest.raises(GraftError) as caught:
                    entry.spec_class(**{"target": Q, name: sign << (bits if name in SIZES else bits + 8)})
                assert caught.value.code in ("GC002", "GC009"), (entry.tag, name)


SIZES = {"bottleneck", "rank", "length", "hidden", "width", "slots", "count", "infix", "target_rank"}


# --- braces and globs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("{a,b}" * 12 + "x" * 2_000, "GC009"),
        ("{a,b}" * 60, "GC009"),
        ("{a,b}" * 10 + "x" * 500, "GC009"),
        ("{" * 5_000, "GC009"),
        ("{" * 17 + "a" + "}" * 17, "GC009"),
        ("{a,{b,{c,d}}}" * 100, "GC009"),
        ("}" * 5_000, "GC002"),
        ("{" * 9, "GC002"),
    ],
)
def test_brace_bombs_are_refused_unexpanded(text: str, code: str) -> None:
    assert in_short(lambda: expand_braces(text)).code == code
    assert in_short(lambda: Target(modules=text)).code in (code, "GC009")


def test_the_measure_of_braces_is_that_of_what_they_expand_to() -> None:
    draw = random.Random(0)
    for _ in range(300):
        text = _random_braces(draw, 3)
        count, size = measure_braces(text)
        expanded = expand_braces(text)
        assert len(expanded) <= count and sum(map(len, expanded)) <= size
        unique = re.sub("[a-z]", lambda _: chr(0x4E00 + draw.randrange(20_000)), text)
        count, size = measure_braces(unique)
        expanded = expand_braces(unique)
        if len(expanded) == count:  # no two branches are equal
            assert sum(map(len, expanded)) == size


def _random_braces(draw: random.Random, depth: int) -> str:
    parts = []
    for _ in range(draw.randrange(1, 3)):
        if depth and draw.random() < 0.6:
            options = (_random_braces(draw, depth - 1) for _ in range(draw.randrange(1, 3)))
            parts.append("{" + ",".join(options) + "}")
        else:
            parts.append(draw.choice("abc"))
    return "".join(parts)


@pytest.mark.parametrize(
    "glob",
    [
        "*a" * 200 + "b",
        "**." * 300 + "b",
        "**.a*." * 100 + "b",
        "**.*a*a*a." * 60 + "**.zz",
        "a**" * 200 + "b",
        "**.{a*,*a,**.a}" * 5 + ".q",
    ],
)
def test_stars_do_not_backtrack(glob: str) -> None:
    names = ["a" * 900, ".".join("a" * 400), ".".join(["aaaaaaa"] * 120)]
    started = time.process_time()
    for name in names:
        assert not glob_to_regex(glob).fullmatch(name)
    assert time.process_time() - started < SECONDS


# --- regular expressions ------------------------------------------------------------------------------------------

NAMES = [
    "a" * 200,
    "model.layers.10.self_attn.q_proj.base_layer.weight.parametrizations.original",
    *map(str, range(99)),
]


@pytest.mark.slow
@pytest.mark.sample(
    "([a-z.]+)+$X",
    "(a|a)*[XYZ]",
    "(?:(.)|(.)|(.)|(.))*[XYZ]",
    "(\\\\w+\\\\.?)+[XYZ]",
    "(a*)*\\\\1[XYZ]",
    "(?=(.*)*[XYZ])(.*)*",
    "pattern8",
)
@pytest.mark.parametrize(
    "pattern",
    ["([a-z.]+)+$X", "(a|a)*[XYZ]", "(.*)*[XYZ]", "(?:(.)|(.)|(.)|(.))*[XYZ]", r"(\w+\.?)+[XYZ]", r"(a*)*\1[XYZ]",
     "(?:(?:.{0,50}){0,5}){0,5}[XYZ]", "(?=(.*)*[XYZ])(.*)*", "(.*?)" * 150 + "[XYZ]", "(?:.?){500}[XYZ]"],
)  # fmt: skip
def test_a_regular_expression_ends(pattern: str) -> None:
    """Matching ends in time, without a match or with GC008 and a hint to use `modules`."""
    started = time.process_time()
    try:
        assert RegexMatcher(0.3).matching(pattern, NAMES) == set()
    except GraftError as error:
        assert error.code == "GC008" and "modules" in error.hint
    assert time.process_time() - started < 3


@pytest.mark.slow
def test_all_targets_of_a_spec_have_their_time_together() -> None:
    matcher = RegexMatcher(0.1)
    slow = "(?:(.)|(.)|(.)|(.))*[XYZ]"
    with pytest.raises(GraftError, match="GC008"):
        matcher.matching(slow, NAMES)
    with pytest.raises(GraftError, match="GC008"):
        matcher.matching("model.*", NAMES)
    sites = [Candidate(name, name, frozenset(), SiteKind.LINEAR) for name in NAMES]
    with pytest.raises(GraftError, match="GC008") as caught:
        select(Target(regex=["a+", slow]), sites, matcher=RegexMatcher(0.1))
    assert caught.value.place is not None and caught.value.place.path == "target.regex[1]"


@pytest.mark.parametrize(
    ("pattern", "code"),
    [
        ("a{99999999999999999999}", "GC009"),
        ("a{1,99999999999999999999}", "GC009"),
        ("(?:a{1000}){1000}", "GC009"),
        ("(?:(?:|a){300}){300}", "GC009"),
        ("(?:(?:(?:a{9}){9}){9}){9}", "GC009"),
        ("(?:" * 200 + "a{2})" * 190 + "){3}" * 10, "GC009"),
        ("(" * 400 + ")" * 400, "GC009"),
        ("(?R)", "GC002"),
        (r"(?P<a>x)(?P>a)", "GC002"),
        ("(", "GC002"),
        ("[a", "GC002"),
        ("*", "GC002"),
        (r"\p{L}", "GC002"),
    ],
)
def test_a_regular_expression_that_cannot_be_compiled(pattern: str, code: str) -> None:
    assert in_short(lambda: check_regex(pattern)).code == code
    assert in_short(lambda: Target(regex=pattern)).code == code


def test_a_pattern_of_which_python_warns_is_taken_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    check_regex("a[b[c]")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        (r".*(?<!k_)proj", ["m.q_proj", "m.v_proj"]),
        (r"(?!.*\.q_).*_proj", ["m.k_proj", "m.v_proj"]),
        (r".*\.(?P<n>[qk])_proj", ["m.q_proj", "m.k_proj"]),
        (r"m\.[qv]_pro", []),
        (r"(?i)M\.Q_PROJ", ["m.q_proj"]),
    ],
)
def test_regular_expressions_mean_what_python_means(pattern: str, matching: list[str]) -> None:
    names = ["m.q_proj", "m.k_proj", "m.v_proj"]
    assert sorted(RegexMatcher().matching(pattern, names)) == sorted(matching)
    assert [n for n in names if re.fullmatch(pattern, n)] == matching


# --- values in messages -------------------------------------------------------------------------------------------


ODD: tuple[Any, ...] = (
    "x" * 10**6,
    [["y" * 10**6] * 1000] * 1000,
    {"k" * 10**6: 1},
    1 << 20_000,
    b"z" * 10**6,
    "\x1b[31m\u202e\x9b\ud800",
    _CYCLE,
    object(),
)


@pytest.mark.parametrize("index", range(len(ODD)))
def test_values_are_shown_short_and_printable(index: int) -> None:
    value = ODD[index]
    for text in (shown(value), quoted(value) if isinstance(value, str) else ""):
        assert len(text) < 250 and text.isprintable(), text


def test_short_values_are_shown_as_they_are() -> None:
    assert [shown(v) for v in (None, True, 3, 0.5, "a'b", [1, "x"])] == [
        "null",
        "true",
        "3",
        "0.5",
        '"a\'b"',
        "[1, 'x']",
    ]
    assert quoted("a.{b,c}") == "'a.{b,c}'" and quoted("a\nb") == r"'a\nb'" and quoted("ü") == "'ü'"


def test_python_objects_are_held_to_the_limits_too() -> None:
    assert in_short(lambda: LoRA(target=Target(role="attn.q"), name="a" * 200)).code == "GC009"
    assert in_short(lambda: Target(modules="x" * 2_000)).code == "GC009"
    assert in_short(lambda: Target(modules="\ud800")).code == "GC010"
    assert in_short(lambda: Spec.model_validate_json('{"adapt": [{"method": "\\ud800"}]}')).code in ("GC001", "GC010")
    assert in_short(lambda: Spec.model_validate_json("[" * 5_000)).code in ("GC001", "GC009")


@pytest.mark.parametrize("unit", ["a", "(a|b)?", "[a-z]*", "a|", "\\w+\\.", "(?=a)"])
def test_a_regular_expression_is_measured_before_it_is_compiled(unit: str) -> None:
    started = time.process_time()
    with pytest.raises(GraftError) as caught:
        check_regex(unit * (1_000_000 // len(unit)))
    assert caught.value.code == "GC009" and time.process_time() - started < 0.5
    started = time.process_time()
    check_regex(unit * (10_000 // len(unit)))
    assert time.process_time() - started < 1


def test_many_regular_expressions_have_one_time_to_be_compiled_and_matched() -> None:
    matcher = RegexMatcher(0.2)
    started = time.process_time()
    with pytest.raises(GraftError) as caught:
        for number in range(10_000):
            matcher.matching(f"({number}|b)*" * 500, ["a"])
    assert caught.value.code == "GC008" and time.process_time() - started < 1
