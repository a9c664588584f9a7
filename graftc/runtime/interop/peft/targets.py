"""Find the modules that a config selects, by the same rules as peft, and globs that match exactly the given modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from graftc.passes.core.grouping import grouped_pairs
from graftc.specs.foreign.config import AdapterConfig
from graftc.specs.patterns import BRANCHES, glob_to_regex
from graftc.specs.regexes import RegexMatcher

ALL_LINEAR = "all-linear"
"""peft's keyword for every linear layer except the head; saved configs list the names instead."""

_LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


def meant(config: AdapterConfig, modules: Sequence[str]) -> set[str] | None:
    """Return the modules that `target_modules` selects by their paths; None if it leaves the choice to peft."""
    targets = config.target_modules
    if targets is None and config.target_parameters:
        targets = []
    if targets is None or targets == ALL_LINEAR:
        return None
    matcher = config.matcher
    selected = _named(targets, modules, matcher)
    if not isinstance(targets, str):
        selected = {path for path in selected if path in targets or _in_layers(config, path, matcher)}
    if config.exclude_modules:
        selected -= _named(config.exclude_modules, modules, matcher)
    saved = config.modules_to_save or ()
    return {path for path in selected if not any(_within(path, word) for word in saved)}


def is_saved(config: AdapterConfig, path: str) -> bool:
    """Return whether `modules_to_save` names a module.

    peft compares suffixes of paths, so ``norm`` also matches ``input_layernorm``.
    """
    return any(path.endswith(word) for word in config.modules_to_save or ())


def _named(targets: Sequence[str] | str, modules: Sequence[str], matcher: RegexMatcher) -> set[str]:
    if isinstance(targets, str):
        return matcher.matching(targets, modules)
    own = set(targets)
    return {path for path in modules if any(end in own for end in _ends(path))}


def _ends(path: str) -> Iterator[str]:
    """Yield the path, and the remainder after each of its dots."""
    while path:
        yield path
        _, _, path = path.partition(".")


def _within(path: str, word: str) -> bool:
    return f".{word}." in f".{path}."


def _in_layers(config: AdapterConfig, path: str, matcher: RegexMatcher) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    index: str | None = None
    patterns = config.layers_pattern
    if patterns:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            numbers = re.findall(r"(?<=\.)\d+(?=\.)", path)
            fits = (n for n in numbers if matcher.matching(rf"(?:.*?\.)?(?:{pattern})\.{n}\..*", [path]))
            index = next(fits, None)
            if index is not None:
                break
    else:
        match = _LAYER.match(path)
        index = match[1] if match else None
    return index is not None and int(index) in ([layers] if isinstance(layers, int) else layers)


def globs(wanted: Collection[str], universe: Collection[str]) -> list[str]:
    """Return globs that match exactly the wanted paths among all paths, as few and as short as possible.

    Args:
        wanted: the paths to match.
        universe: all paths that a glob is matched against.
    """
    left, result = dict.fromkeys(wanted), list[str]()
    groups = grouped_pairs((re.sub(r"(?<![^.])\d+(?![^.])", "*", path), path) for path in left)
    covered: set[str] = set()
    for shape, members in groups.items():
        if covered.issuperset(members):
            continue
        for glob in _candidates(shape, members):
            fits = glob_to_regex(glob).fullmatch
            hits = {path for path in universe if fits(path)}
            if hits <= left.keys() and hits.issuperset(members):
                result.append(glob)
                covered |= hits
                break
        else:
            result += [path for path in members if path not in covered]
            covered.update(members)
    return result


def _candidates(shape: str, members: Sequence[str]) -> Iterator[str]:
    segments = shape.split(".")
    for count in range(1, len(segments)):
        if segments[-count] != "*":
            yield ".".join(["**", *segments[-count:]])
    yield shape
    split = [member.split(".") for member in members]
    columns = [list(dict.fromkeys(column)) for column in zip(*split, strict=True)]
    if sum(len(column) > 1 for column in columns) == 1 and len(members) <= BRANCHES:
        yield ".".join(c[0] if len(c) == 1 else f"{{{','.join(c)}}}" for c in columns)


def suffixes(wanted: Collection[str], universe: Collection[str]) -> list[str]:
    """Return the shortest path suffixes by which peft selects exactly the wanted paths among all paths."""
    allowed, result = set(wanted), list[str]()
    meaning = grouped_pairs((end, path) for path in universe for end in _ends(path))
    for path in wanted:
        if any(end in result for end in _ends(path)):
            continue
        fits = [end for end in _ends(path) if allowed.issuperset(meaning.get(end, [path]))]
        result.append(fits[-1] if fits else path)
    return result
