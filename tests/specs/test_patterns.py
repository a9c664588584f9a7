"""Braces, globs and layer slices, each compared with an independent, slower definition."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.patterns import (
    BRANCHES,
    expand_braces,
    glob_to_regex,
    layer_indices,
    match_modules,
    parse_layer,
    smallest_fix,
    suggest,
    write_layers,
)

words = st.text(alphabet="abc", min_size=0, max_size=2)
segments = st.text(alphabet="abc", min_size=1, max_size=3)
paths = st.lists(segments, min_size=1, max_size=5).map(".".join)


def brace_trees(depth: int = 2) -> st.SearchStrategy[tuple[str, list[str]]]:
    """A text with braces, and its alternatives built alongside it rather than parsed from it."""
    leaf = words.map(lambda w: (w, [w]))
    if depth == 0:
        return leaf

    def group(options: list[tuple[str, list[str]]]) -> tuple[str, list[str]]:
        return "{" + ",".join(text for text, _ in options) + "}", [b for _, bs in options for b in bs]

    def join(parts: list[tuple[str, list[str]]]) -> tuple[str, list[str]]:
        text, branches = "", [""]
        for piece, options in parts:
            text, branches = text + piece, [a + b for a in branches for b in options]
        return text, branches

    groups = st.lists(brace_trees(depth - 1), min_size=1, max_size=3).map(group)
    return st.lists(st.one_of(leaf, groups), min_size=1, max_size=3).map(join)


@pytest.mark.slow
@given(brace_trees())
def test_braces_expand_to_their_alternatives_in_order_without_repeats(tree: tuple[str, list[str]]) -> None:
    text, branches = tree
    assume(len(branches) <= BRANCHES)
    assert expand_braces(text) == list(dict.fromkeys(branches))


@pytest.mark.parametrize("text", ["a{b", "a}b", "{a,{b}", "a{b}}", "}{"])
def test_braces_that_do_not_pair_are_an_error(text: str) -> None:
    with pytest.raises(GraftError) as caught:
        expand_braces(text)
    assert caught.value.code == "GC002"


def test_a_brace_bomb_is_refused_before_it_is_built() -> None:
    with pytest.raises(GraftError, match=r"GC009: .* more than 1,000 alternatives"):
        expand_braces("{a,b}" * 60)


def segment_matches(pattern: str, segment: str) -> bool:
    """Return whether one segment matches, by trying every split at the first star."""
    head, star, tail = pattern.partition("*")
    if not star:
        return pattern == segment
    if not segment.startswith(head):
        return False
    rest = segment[len(head) :]
    return any(segment_matches(tail, rest[i:]) for i in range(len(rest) + 1))


def path_matches(pattern: list[str], path: list[str]) -> bool:
    """Return whether a list of segments matches, by the plain definition of ``**``."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(path_matches(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return bool(path) and segment_matches(pattern[0], path[0]) and path_matches(pattern[1:], path[1:])


glob_segments = st.one_of(st.just("**"), st.just("*"), segments, st.text(alphabet="ab*", min_size=1, max_size=3))
globs = st.lists(glob_segments, min_size=1, max_size=5)


@given(globs, paths)
def test_globs_match_as_defined(glob: list[str], path: str) -> None:
    assert bool(glob_to_regex(".".join(glob)).fullmatch(path)) == path_matches(glob, path.split("."))


@given(paths)
def test_a_path_is_a_glob_that_matches_itself_only(path: str) -> None:
    pattern = glob_to_regex(path)
    assert pattern.fullmatch(path)
    assert not pattern.fullmatch(path + "x")
    assert not pattern.fullmatch("x." + path)


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("**.query", "query", True),
        ("**.query", "a.b.query", True),
        ("**.query", "a.myquery", False),
        ("encoder.**", "encoder", True),
        ("encoder.**", "encoder.layer.0", True),
        ("encoder.**", "encoders.layer", False),
        ("*.layer.*.q", "bert.layer.11.q", True),
        ("*.layer.*.q", "bert.layer.q", False),
        ("**.layer.0.**", "bert.layer.0.attention", True),
        ("**.layer.0.**", "bert.layer.10.attention", False),
        ("**.{q,v}_proj", "m.v_proj", True),
        ("**.{q,v}_proj", "m.k_proj", False),
        ("a.b", "aXb", False),
        ("a+", "aa", False),
        ("**", "a.b.c", True),
        ("**.**", "a", True),
    ],
)
def test_globs_by_example(glob: str, path: str, expected: bool) -> None:
    assert bool(glob_to_regex(glob).fullmatch(path)) is expected


bounds = st.one_of(st.none(), st.integers(-9, 9))


@given(bounds, bounds, st.one_of(st.none(), st.integers(1, 4)), st.integers(0, 8))
def test_slices_of_layers_are_slices_of_a_list(
    start: int | None, stop: int | None, step: int | None, depth: int
) -> None:
    text = f"{'' if start is None else start}:{'' if stop is None else stop}"
    text += "" if step is None else f":{step}"
    assert layer_indices(text, depth) == set(list(range(depth))[start:stop:step])


@given(st.integers(-9, 9), st.integers(0, 8))
def test_indices_of_layers_are_indices_of_a_list(index: int, depth: int) -> None:
    try:
        expected = {list(range(depth))[index]}
    except IndexError:
        expected = set()
    assert layer_indices(index, depth) == expected
    assert layer_indices(str(index), depth) == expected


@pytest.mark.parametrize("text", ["", "a", "1-3", "1:2:3:4", "0:6:-1", "1.5", ":x"])
def test_what_is_no_layer_is_an_error(text: str) -> None:
    with pytest.raises(GraftError) as caught:
        parse_layer(text)
    assert caught.value.code == "GC002"


def test_step_zero_is_an_error() -> None:
    with pytest.raises(GraftError, match="step 0"):
        parse_layer("0:6:0")


@given(st.sets(st.integers(0, 30), min_size=1))
def test_written_layers_read_back(layers: set[int]) -> None:
    entries = re.findall(r'"(\d+:\d+)"|(\d+)', write_layers(sorted(layers)))
    read = [layer_indices(piece or single, 31) for piece, single in entries]
    assert frozenset().union(*read) == layers
    assert sum(map(len, read)) == len(layers)


@pytest.mark.parametrize(
    ("text", "wrong", "right", "fix"),
    [
        ("**.querry", "**.querry", "**.query", ("**.querry", "**.query")),
        ("**.{querry,value}", "**.querry", "**.query", ("querry", "query")),
        ("attn.{qq,v}", "attn.qq", "attn.q", ("qq", "q")),
        ("{a,b}.{a,c}", "a.c", "b.c", None),
        ("x.{a,b}", "x.a", "y.c", None),
    ],
)
def test_the_smallest_fix(text: str, wrong: str, right: str, fix: tuple[str, str] | None) -> None:
    assert smallest_fix(text, wrong, right) == fix


MODULES = [f"bert.encoder.layer.{i}.attention.self.{n}" for i in range(2) for n in ("query", "key", "value")]


@pytest.mark.parametrize(
    ("glob", "hint", "fix"),
    [
        ("**.querry", "did you mean '**.query' or '**.key'?", ("**.querry", "**.query")),
        ("query", "'**.query' matches 2 sites", ("query", "**.query")),
        ("bert.encoder.layer.0", "'bert.encoder.layer.0.**' matches 3 sites", None),
        ("layer.0", "'**.layer.0.**' matches 3 sites", ("layer.0", "**.layer.0.**")),
        ("**.layer.[01].**", "'?' and '[...]' stand for themselves here; use regex instead", None),
        ("zzz", None, None),
    ],
)
def test_suggestions(glob: str, hint: str | None, fix: tuple[str, str] | None) -> None:
    found_hint, found_fix = suggest(glob, glob, MODULES)
    assert found_hint == hint
    if fix is not None:
        assert found_fix == fix


def test_a_suggestion_names_real_layers_where_the_glob_does() -> None:
    hint, _ = suggest("bert.encoder.layer.0.attention.self.kye", "", MODULES)
    assert hint is not None and "'bert.encoder.layer.0.attention.self.key'" in hint


def test_match_modules_keeps_the_order_of_modules() -> None:
    assert match_modules(["**.value", "**.{query,key}"], MODULES) == MODULES


def test_match_modules_refuses_a_branch_without_a_match() -> None:
    with pytest.raises(GraftError) as caught:
        match_modules(["**.key", "**.{query,valeu}"], MODULES)
    assert caught.value.code == "GC011"
    assert caught.value.place is not None and caught.value.place.path == "train[1]"
    assert caught.value.message == "train '**.valeu' of '**.{query,valeu}' matches none of the 6 modules"
    assert caught.value.fix == ("valeu", "value")
