"""``python -m tools.campaign --seeds 0:1000``: run the campaign, and print what it found."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tools.campaign.running import RESULTS, Limits, counts_of, outcome_of, run, stored


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tools.campaign", description=__doc__)
    parser.add_argument("--seeds", default="0:1000", help="first and last seed, as in a slice (default: 0:1000)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    parser.add_argument("--only", help="the one route to take, instead of two drawn ones")
    parser.add_argument(
        "--show", type=int, metavar="SEED", help="print the case of a seed and its result, if there is one"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file of results")
    parser.add_argument("--any-state", action="store_true", help="keep results that other sources gave")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="time of a seed (default: 120)")
    options = parser.parse_args(arguments)
    if options.show is not None:
        return _show(options.show, options.results)
    first, _, last = options.seeds.partition(":")
    seeds = range(int(first), int(last)) if last else range(int(first), int(first) + 1)
    results = options.results if options.only is None else options.results.with_suffix(f".{options.only}.jsonl")
    limits = Limits(seconds=options.seconds)
    records = run(
        seeds, results, jobs=options.jobs, only=options.only, limits=limits, any_state=options.any_state, tell=_tell
    )
    for title, counter in counts_of(records.values()).items():
        print(f"{title}: " + ", ".join(f"{name} {count}" for name, count in sorted(counter.items())))
    print(f"seconds: {sum(record.get('seconds', 0) for record in records.values()):.0f}")
    failed = {seed: record for seed, record in records.items() if record.get("findings")}
    for seed, record in failed.items():
        print(f"\n# seed {seed}: {outcome_of(record)}: {json.dumps(record['findings'])[:600]}")
        for check, text in record.get("scripts", {}).items():
            print(f"# {check}, reduced:\n{text}")
    return 1 if failed else 0


def _tell(text: str) -> None:
    print(text, flush=True)


def _show(seed: int, results: Path) -> int:
    from tools.campaign.case import draw_case

    print(json.dumps(draw_case(seed).to_json(), indent=1))
    record = stored(results).get(seed)
    if record is not None:
        print(json.dumps({name: value for name, value in record.items() if name != "scripts"}, indent=1))
        for text in record.get("scripts", {}).values():
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
