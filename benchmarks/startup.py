"""The time of the commands that need no model: processor seconds, beside Python doing nothing.

``python -m benchmarks.startup`` prints a table of medians over 15 rounds, each of which runs every command once.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

ROUNDS = 15
COMMANDS = {
    "python -c pass": ("-c", "pass"),
    "graftc --help": ("-m", "graftc", "--help"),
    "graftc methods": ("-m", "graftc", "methods"),
    "graftc methods lora --json": ("-m", "graftc", "methods", "lora", "--json"),
    "graftc schema": ("-m", "graftc", "schema"),
}


def seconds(arguments: tuple[str, ...]) -> float:
    """Return the processor seconds of one run."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    after = os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


def main() -> None:
    """Print the table."""
    rounds = [{name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(ROUNDS)]
    print(f"processor seconds, median of {ROUNDS} rounds")
    for name in COMMANDS:
        print(f"{statistics.median(times[name] for times in rounds):6.2f}  {name}")


if __name__ == "__main__":
    main()
