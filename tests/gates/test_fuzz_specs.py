"""Random specs: each one parses or ends in a coded error, in bounded time and memory, and touches nothing outside.

`GRAFTC_FUZZ` sets their number; `make fuzz` takes 10,000.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.specs import GraftError, Spec, parse_spec
from graftc.specs.errors.text import printable
from graftc.specs.io import dump_spec
from graftc.specs.registry import method_specs
from graftc.specs.roles import ROLES
from graftc.testing.families import bert
from tests.kit.places import ROOT

COUNT = int(os.environ.get("GRAFTC_FUZZ", "200"))
# At full counts this is one of the long gates; every run includes a sample.
pytestmark = [pytest.mark.gate] if COUNT > 1_000 else []
CHECKED = max(3, COUNT // 400)
SECONDS, BYTES = 5.0, 1 << 30
SEEDS = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("examples/specs/*.yaml"))]
GOLDEN = [path.read_text(encoding="utf-8").partition("=====\n")[0] for path in ROOT.glob("tests/golden/errors/*.txt")]

HOSTILE: tuple[Callable[[random.Random], Any], ...] = (
    lambda r: r.choice((None, True, False, 0, -1, 1, 2**31, 2**62, 2**63, 2**70, -(2**64), 10**300)),
    lambda r: r.choice((0.0, -0.0, 0.5, 1.0, -1.5, 1e-320, 1e308, float("inf"), float("nan"))),
    lambda r: r.choice(("", " ", "\0", "\x1b[31m", "\u202e", "\ud800", "a\nb", "..", ".", "**", "***", "*" * 500)),
    lambda r: r.choice(("{", "}", "{}", "{,}", "{a,b}" * 9, "{" * 99, "{a,{b,{c,{d}}}}" * 7, "x" * 999, "x" * 5_000)),
    lambda r: r.choice(("(a+)+$", "(.*)*[X]", "(?:(.)|(.))*[X]", "(?:a{99}){99}", "(" * 300, "[", r"\p{L}", "(?R)")),
    lambda r: r.choice(("0:", ":", "::0", "-1:", "9" * 30, "1:2:3:4", "٣", "1_000", "0x10", "1e3")),
    lambda r: "".join(r.choice("{},*.?[]()|+\\^$ab_0-:\x00\x1b\u202eé") for _ in range(r.randrange(40))),
    lambda r: [hostile(r) for _ in range(r.randrange(4))],
    lambda r: {
        r.choice(("method", "target", "role", "", "x" * 200, "\x1b")): hostile(r) for _ in range(r.randrange(3))
    },
    lambda r: _nested(r.randrange(60)),
)


PIECES = (
    *("", "{", "\t", "\0", "\n", ": ", "- ", "&a ", "*a", "!!set ", "\ufeff"),
    *("\x1b", "\u2028", "'", '"', "#", "|", "? "),
)


def _nested(depth: int) -> Any:
    value: Any = "x"
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


def hostile(draw: random.Random) -> Any:
    """Return a value that no field expects, or that a field expects but should reject."""
    return draw.choice(HOSTILE)(draw)


def structured(draw: random.Random) -> dict[str, Any]:
    """Return a spec of known fields, most of which have usual values."""
    entries = list(method_specs().values())
    adapt = []
    for _ in range(draw.choice((1, 1, 2, 3, 40))):
        entry = draw.choice(entries)
        item: dict[str, Any] = {"method": entry.tag, "target": target(draw)}
        for name, info in entry.spec_class.model_fields.items():
            if isinstance(info.default, bool | int | float | str) and name != "method" and draw.random() < 0.1:
                item[name] = usual(draw, info.default)
        adapt.append(item)
    data: dict[str, Any] = {"adapt": adapt}
    options = {
        "version": 1,
        "train": ["classifier"],
        "compose": [{draw.choice(("stack", "average", "bank", "fuse", "gate", "split")): ["lora", "lora_2"]}],
        "tokens": {"add": ["<a>", "<b>"]},
        "untie": ["**"],
        "checkpoint": "layers",
        "fold": {"budget": {"logits": 0.1}},
    }
    for name, value in options.items():
        if draw.random() < 0.15:
            data[name] = value
    for _ in range(draw.randrange(3)):
        mutate(draw, data)
    return data


def target(draw: random.Random) -> dict[str, Any]:
    return draw.choice(
        (
            {"role": draw.choice(list(ROLES))},
            {"role": "attn.{q,v}", "layers": draw.choice((0, -1, "0:1", [0, 1]))},
            {"modules": draw.choice(("**.query", "**.dense", "**", "bert.encoder.layer.*.attention.**"))},
            {"regex": r".*\.(query|value)"},
        )
    )


def usual(draw: random.Random, default: Any) -> Any:
    if isinstance(default, bool):
        return not default
    if isinstance(default, int | float):
        return draw.choice((default, default + 1, default * 2))
    return default


def mutate(draw: random.Random, data: Any) -> None:
    """Insert something hostile at a random place of plain data."""
    container = data
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(container[key], dict | list) and container[key] and draw.random() < 0.7:
            container = container[key]
            continue
        change = draw.random()
        if change < 0.6:
            container[key] = hostile(draw)
        elif change < 0.8 and isinstance(container, dict):
            container[draw.choice((f"{key}s", "x", "\x1b[2J", str(key)[:-1]))] = hostile(draw)
        elif isinstance(container, list):
            container *= draw.choice((0, 2, 30))
        else:
            del container[key]
        break


def toml(data: Any) -> str:
    """Return plain data as an inline TOML value, as far as TOML can express it."""
    if isinstance(data, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {toml(v)}" for k, v in data.items()) + "}"
    if isinstance(data, list):
        return "[" + ", ".join(map(toml, data)) + "]"
    return json.dumps("null" if data is None else data)


def written(draw: random.Random) -> tuple[str, str]:
    """Return a format and a text."""
    format = draw.choice(("yaml", "yaml", "json", "toml"))
    kind = draw.random()
    if kind < 0.6:
        data = structured(draw)
        return format, "\n".join(
            f"{json.dumps(k)} = {toml(v)}" for k, v in data.items()
        ) if format == "toml" else json.dumps(data)
    if kind < 0.85:
        text = draw.choice(SEEDS + GOLDEN)
        for _ in range(draw.randrange(1, 6)):
            at, length = draw.randrange(len(text) + 1), draw.randrange(8)
            piece = draw.choice((*PIECES, "[" * draw.randrange(99), "9" * draw.randrange(5_000)))
            text = text[:at] + piece + text[at + length :]
        return format, text
    raw = bytes(draw.choice((draw.randrange(256), *b'{}[]:,-"\n =.a0')) for _ in range(draw.randrange(400)))
    return format, raw.decode("utf-8", draw.choice(("replace", "ignore", "backslashreplace", "surrogateescape")))


# --- watching accesses ----------------------------------------------------------------------------------------------

_touched: list[str] | None = None
OUTSIDE = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.dlopen", "exec", "webbrowser.", "ftplib.", "urllib.")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _touched is not None and (event == "open" or event.startswith(OUTSIDE)):
        _touched.append(f"{event} {arguments[:2]!r:.200}")


sys.addaudithook(_audit)


@contextmanager
def watched() -> Iterator[list[str]]:
    """Record what is opened, run or connected to while the block runs."""
    global _touched
    _touched = events = []
    try:
        yield events
    finally:
        _touched = None


def peak() -> int:
    """Return the peak memory of the process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def outcome(format: str, text: str) -> Spec | None:
    """Return the spec, or None after a well-formed coded error."""
    started = time.process_time()
    try:
        return parse_spec(text, format=format)  # type: ignore[arg-type]
    except GraftError as error:
        told = str(error)
        assert error.hint and len(told) < 50_000 and printable(told) == told
        json.dumps(error.to_json())
        return None
    finally:
        assert time.process_time() - started < SECONDS


@pytest.fixture(scope="module")
def parsed() -> list[Spec]:
    """The specs that parse; the others were refused properly."""
    for format, text in (
        ("yaml", SEEDS[0]),
        ("json", '{"adapt": [{"method": "lora", "target": {"regex": "("}}]}'),
        ("toml", ""),
    ):
        outcome(format, text)  # imports what readers need, before anything is measured
    for entry in method_specs().values():
        entry.spec_class.model_rebuild()
    specs, before = [], peak()
    for seed in range(COUNT):
        format, text = written(random.Random(seed))
        try:
            with watched() as touched:
                spec = outcome(format, text)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error!s:.500}") from error
        assert not touched, f"seed {seed}: {touched}"
        if spec is not None:
            specs.append(spec)
    assert peak() - before < BYTES
    return specs


@pytest.mark.slow
def test_random_texts_parse_or_are_refused(parsed: list[Spec]) -> None:
    assert COUNT // 20 <= len(parsed) <= COUNT * 3 // 4  # the texts include both kinds


@pytest.mark.slow
def test_what_parses_survives_being_written(parsed: list[Spec]) -> None:
    for spec in parsed[:: max(1, len(parsed) // 100)]:
        assert parse_spec(dump_spec(spec)) == spec


@pytest.mark.slow
def test_what_parses_compiles_or_is_refused(parsed: list[Spec], tmp_path: Path) -> None:
    built = bert()
    model, inputs = built if isinstance(built, tuple) else (built, None)
    before, files = peak(), set(tmp_path.parent.iterdir())
    for number, spec in enumerate(parsed[:CHECKED]):
        started = time.process_time()
        with watched() as touched, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                graftc.check(spec, model, inputs)
            except GraftError as error:
                assert error.code != "GC099" and error.hint, number
        assert time.process_time() - started < 6 * SECONDS, dump_spec(spec)
        assert not [t for t in touched if t.startswith(("socket.", "subprocess."))], touched
    assert peak() - before < BYTES and set(tmp_path.parent.iterdir()) == files
