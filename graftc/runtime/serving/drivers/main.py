"""The script that `graftc.runtime.serving.running` starts: ``python -P main.py DRIVER`` with a request on stdin.

It prints one line of JSON to stdout, the answer or ``{"error": ...}``. What an engine prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(driver: str) -> dict[str, Any]:
    """Return the driver's answer to the request on stdin, or the kind of error that it raised, with its message.

    Drivers call the engine through ``timed``, so that the answer has the seconds of each call.
    """
    request, seconds = json.load(sys.stdin), list[float]()

    def timed(call: Callable[..., Any], *arguments: Any) -> Any:
        begun = time.perf_counter()
        result = call(*arguments)
        seconds.append(time.perf_counter() - begun)
        return result

    try:
        generate = runpy.run_path(str(Path(__file__).with_name(f"{driver}.py")))["generate"]
        return {**generate(request, timed), "seconds": seconds}
    except ImportError as error:
        return {"missing": str(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)
    line = json.dumps(main(sys.argv[1]))
    with open(answers, "w", encoding="utf-8") as to:
        to.write(line + "\n")
    sys.stderr.flush()
    os._exit(0)  # some engines abort, or wait for their threads, when the interpreter ends
