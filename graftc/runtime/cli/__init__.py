"""The command line. Commands import what they need when they run, so that help and listings load no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from graftc.runtime.cli.failures import show_failure

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        arguments: what stands after ``graftc``; that of the process by default.

    Returns:
        0 done, 1 the answer is no, 2 a usage or spec error, 3 the files or the model failed, 130 interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    from graftc.runtime.cli.app import build_app

    try:
        status = build_app()(given or ["--help"], prog_name="graftc", standalone_mode=False)
    except Exception as error:
        return show_failure(error, as_json="--json" in given)
    return status if isinstance(status, int) else 0
