"""The mutants of a seed: which ones, and the tests that run against each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.mutants.areas import Area, file_of
from tools.mutants.covered import Coverage
from tools.mutants.mutations import Mutation, mutations


@dataclass(frozen=True)
class Mutant:
    """A numbered change of a file.

    Attributes:
        number: counts from 0 over all areas in turn, so that the first ones stay if more are asked for.
        area: the name of its area.
        path: the file, relative to the root.
        mutation: the change.
        text: the file before it.
    """

    number: int
    area: str
    path: str
    mutation: Mutation
    text: str

    @property
    def key(self) -> str:
        """The digest by which arguments for equivalent mutants are kept."""
        return self.mutation.key(self.path, self.text)

    @property
    def trial(self) -> str:
        """The digest by which its outcome is kept, valid for this text of the file."""
        return f"{self.key}.{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def shown(self) -> str:
        """Return the place, the line and what becomes of it."""
        before, after = self.mutation.lines(self.text)
        return f"{self.path}:{self.mutation.line} ({self.mutation.kind})\n- {before}\n+ {after}"


def mutants(root: Path, areas: Sequence[Area], coverage: Coverage, seed: int, count: int) -> list[Mutant]:
    """Return the first mutants of a seed, the areas in turn.

    Within an area, files come in an order of the seed's, again and again, and each gives its changes, all kinds in
    turn. The order depends on nothing but the seed and the text of the files. Lines that no test runs are passed
    over.

    Args:
        root: the folder of the sources.
        areas: all areas; an area that has no more changes is passed over.
        coverage: the lines that tests run.
        seed: of the order.
        count: how many mutants, fewer if there are not as many.
    """
    streams = [_of_area(root, area, coverage, seed) for area in areas]
    chosen: list[Mutant] = []
    while streams and len(chosen) < count:
        for stream in list(streams):
            one = next(stream, None)
            if one is None:
                streams.remove(stream)
            elif len(chosen) < count:
                chosen.append(Mutant(len(chosen), *one))
    return chosen


def _of_area(root: Path, area: Area, coverage: Coverage, seed: int) -> Iterator[tuple[str, str, Mutation, str]]:
    texts = {path: (root / path).read_text(encoding="utf-8") for path in area.files(root)}
    order = sorted(texts, key=lambda path: _rank(seed, path))
    left = [(path, _candidates(path, texts[path], coverage, seed)) for path in order]
    while left:
        left = [(path, candidates) for path, candidates in left if candidates]
        for path, candidates in left:
            one = candidates.pop(0)
            if one.compiles(texts[path]):
                yield area.name, path, one, texts[path]


def _candidates(path: str, text: str, coverage: Coverage, seed: int) -> list[Mutation]:
    """Return the changes of lines that tests run: one of each kind, then a second one of each, and so on."""
    lines = coverage.lines.get(path, {})
    by_kind: dict[str, list[Mutation]] = {}
    for one in mutations(text):
        if one.line in lines:
            by_kind.setdefault(one.kind, []).append(one)
    rounds: list[tuple[int, str, Mutation]] = []
    for kind, changes in by_kind.items():
        changes.sort(key=lambda one: _rank(seed, path, str(one.start), one.old, one.new))
        rounds += [(place, _rank(seed, path, kind), one) for place, one in enumerate(changes)]
    return [one for _, _, one in sorted(rounds, key=lambda entry: entry[:2])]


def _rank(seed: int, *parts: str) -> str:
    return hashlib.sha256("\0".join((str(seed), *parts)).encode()).hexdigest()


def chosen_tests(mutant: Mutant, coverage: Coverage, tests: Sequence[str], seconds: float) -> list[tuple[str, float]]:
    """Return the tests to run against a mutant, with the seconds that each takes, as many as fit into a time.

    The tests that run the line come first. Then come the others of their files, which may look at what these have made
    (tests of a class share a model), and then the other tests of the area, files that are named as the mutant's before
    others. Tests of one file stay together, since they share fixtures; files come in the order of their time.

    Args:
        mutant: the mutant.
        coverage: the lines that tests run, and the tests' seconds.
        tests: the test files of the area.
        seconds: the time.
    """
    covering = coverage.lines.get(mutant.path, {}).get(mutant.mutation.line, set())
    files = {file_of(test) for test in covering}
    name = Path(mutant.path).stem
    groups = [
        covering,
        {test for test in coverage.seconds if file_of(test) in files and test not in covering},
        {test for test in coverage.seconds if file_of(test) in tests and file_of(test) not in files},
    ]
    chosen: list[tuple[str, float]] = []
    for group in groups:
        by_file: dict[str, list[tuple[str, float]]] = {}
        for test, took in coverage.seconds.items():
            if test in group:
                by_file.setdefault(file_of(test), []).append((test, took))
        for file in sorted(by_file, key=lambda file: (name not in file, sum(took for _, took in by_file[file]))):
            for test, took in by_file[file]:
                if took <= seconds:
                    chosen.append((test, took))
                    seconds -= took
    return chosen
