"""Functions for the processes of a campaign in tests: quick, and without torch."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from typing import Any

from tools.forked import finish

EQUAL = {"compile": {"status": "equal"}}


def equal(sender: Connection, seed: int, only: str | None, limits: Any) -> None:
    """Report that everything is equal."""
    finish(sender, {"seed": seed, "checks": EQUAL, "findings": {}})


def uneven(sender: Connection, seed: int, only: str | None, limits: Any) -> None:
    """Die for seed 0, hang for seed 1 after naming a step, find something for seed 2, and be refused otherwise."""
    if seed == 0:
        os._exit(3)
    if seed == 1:
        sender.send({"seed": seed, "checks": EQUAL, "step": "merge"})
        time.sleep(60)
    status = "difference" if seed == 2 else "refused"
    checks = {"compile": {"status": status, "code": "GC017"}}
    finish(sender, {"seed": seed, "checks": checks, "findings": checks if seed == 2 else {}})
