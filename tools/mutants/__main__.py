"""``python -m tools.mutants``: change the sources in small ways, and see whether tests notice."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tools.mutants.areas import AREAS, ROOT, Area, files_of_tests
from tools.mutants.choice import Mutant, chosen_tests, mutants
from tools.mutants.covered import MARKS, Coverage, Map
from tools.mutants.tree import Tree
from tools.mutants.trial import SECONDS, Outcome, Results, failing_without, tried

EQUIVALENT = Path(__file__).with_name("equivalent.json")
ALLOWED = 3
"""The number of mutants of 60 that may survive without being equivalent."""


def main(
    arguments: list[str] | None = None,
    root: Path = ROOT,
    areas: Sequence[Area] = AREAS,
    equivalent: Path = EQUIVALENT,
) -> int:
    """Run the command line, and return the exit status: 1 if too many mutants survive.

    Args:
        arguments: those of the command line, by default the process's own.
        root: the folder of sources and tests; ``build/mutants`` in it is written.
        areas: the areas to choose from.
        equivalent: a JSON file, arguments by the digests of mutants that compute the same.
    """
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the choice (0)")
    parser.add_argument("--count", type=int, default=60, help="mutants, the areas in turn (60)")
    parser.add_argument("--only", metavar="AREA", choices=[area.name for area in areas], help="run those of one area")
    parser.add_argument("--show", metavar="N", type=int, help="show mutant N and its tests; nothing is run")
    parser.add_argument("--again", action="store_true", help="run those again that survived, as after adding tests")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"that a mutant may take ({SECONDS:.0f})")
    parser.add_argument("--marks", default=MARKS, help=f"which tests, as pytest's -m ({MARKS})")
    parser.add_argument("--as-measured", action="store_true", help="measure no tests, but use what is known of them")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    options = parser.parse_args(arguments)

    work = root / "build" / "mutants"
    tree = Tree(root, work / "tree")
    tree.update()
    known = Map(tree, work)
    sources = [path for area in areas for path in area.files(root)]
    if not (options.table or options.as_measured or options.show is not None):
        for area in areas:
            known.measure(area, sources, options.marks, lambda text: print(text, flush=True))
    coverage = known.read(options.marks)
    chosen = mutants(root, areas, coverage, options.seed, options.count)
    tests = {area.name: files_of_tests(tree.folder, area.tests) for area in areas}

    def own(mutant: Mutant) -> list[tuple[str, float]]:
        return chosen_tests(mutant, coverage, tests[mutant.area], options.seconds / 2)

    if options.show is not None:
        mutant = chosen[options.show]
        print(mutant.shown(), f"key {mutant.key}", *(f"{took:8.2f} s  {test}" for test, took in own(mutant)), sep="\n")
        return 0
    results = Results(work / "results.jsonl")
    outcomes = results.read()
    new: list[Mutant] = []
    for mutant in chosen:
        before = outcomes.get(mutant.trial)
        due = before is None or (options.again and not before.caught)
        if options.table or not due or options.only not in (None, mutant.area):
            continue
        outcome = tried(tree, mutant, own(mutant), options.seconds)
        results.add(mutant, outcome)
        outcomes[mutant.trial] = outcome
        new.append(mutant)
        print(
            f"{mutant.number:3} {mutant.area:9} {outcome.outcome:9} {outcome.seconds:5.0f} s  {outcome.test}",
            flush=True,
        )
    for mutant in _wrongly_caught(tree, new, outcomes, coverage):
        results.add(mutant, replace(outcomes[mutant.trial], outcome="invalid"))
    arguments_for = json.loads(equivalent.read_text(encoding="utf-8"))
    return _summary(chosen, results.read(), arguments_for)


def _wrongly_caught(
    tree: Tree, new: Sequence[Mutant], outcomes: Mapping[str, Outcome], coverage: Coverage
) -> list[Mutant]:
    """Return the mutants whose test fails without them as well."""
    tests = {outcomes[mutant.trial].test for mutant in new if outcomes[mutant.trial].outcome == "caught"}
    left = {test: took for test, took in coverage.seconds.items() if test in tests}
    wrong = set()
    while left and (failed := failing_without(tree, list(left.items()))):
        wrong.add(failed)
        if left.pop(failed, None) is None:
            raise RuntimeError(f"tests do not run without a mutant: {failed}")
    return [mutant for mutant in new if outcomes[mutant.trial].test in wrong]


def _summary(
    chosen: Sequence[Mutant], outcomes: Mapping[str, Outcome], arguments: Mapping[str, Mapping[str, str]]
) -> int:
    """Print a table by area and the survivors, and return the exit status."""
    columns = ("caught", "timeout", "equivalent", "survived", "invalid", "not run")
    counts: dict[str, Counter[str]] = {mutant.area: Counter() for mutant in chosen}
    survivors: list[Mutant] = []
    for mutant in chosen:
        outcome = outcomes[mutant.trial].outcome if mutant.trial in outcomes else "not run"
        if outcome == "survived" and mutant.key in arguments:
            outcome = "equivalent"
        if outcome == "survived":
            survivors.append(mutant)
        counts[mutant.area][outcome] += 1
    print(f"{'':10}" + "".join(f"{column:>12}" for column in columns))
    for area, count in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"{area:10}" + "".join(f"{count[column]:12}" for column in columns))
    for mutant in survivors:
        print(f"\n{mutant.number} survived, key {mutant.key}\n{mutant.shown()}")
    return int(len(survivors) * 60 > ALLOWED * max(60, len(chosen)))


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the tests that run end too, and the copy is restored
    sys.exit(main())
