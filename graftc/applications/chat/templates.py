"""Try out chat templates, which are third-party programs, in a separate process before they are used."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftc.specs.errors.diagnostics import GraftError

_WORKER = Path(__file__).with_name("template_worker.py")
_SECONDS, _WAIT = 2, 20.0
"""The processor time that rendering may use, and the time to wait for a reply, including process start; in seconds."""
_ENDING = 0.2
_MEMORY = 2**28
_CHARACTERS = 2**20
"""The number of characters that a template may add; it may also repeat the messages `_REPEATED` times."""
_REPEATED = 8


def require_bounded(template: str, messages: Sequence[Mapping[str, str]], given: Mapping[str, Any]) -> None:
    """Refuse a chat template that fails on these messages, or exceeds the limits on time, memory or output.

    Args:
        template: the template, as in the tokenizer.
        messages: the messages to render.
        given: all other variables of the template; values that are not plain data are passed as text.

    Raises:
        GraftError: GC147 if the template is refused.
    """
    listed = [dict(message) for message in messages]
    size = len(json.dumps(listed))
    asked = {
        "template": template,
        "given": {**given, "messages": listed},
        "characters": _CHARACTERS + _REPEATED * size,
        "seconds": _SECONDS,
        "memory": _MEMORY,
    }
    reason = _worker.ask(json.dumps(asked, default=str))
    if reason is not None:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        message = f"the chat template does not accept messages with the roles {roles}: {reason.rstrip('.')}"
        raise GraftError("GC147", message)


class _Worker:
    """The worker process, which is started on the first request and restarted after it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = os.getpid()

    def ask(self, line: str) -> str | None:
        """Return the reason why a template cannot be used; None if it can be used."""
        with self._lock:
            process, answer = self._running(), ""
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(line + "\n")
                process.stdin.flush()
                with selectors.DefaultSelector() as selector:
                    selector.register(process.stdout, selectors.EVENT_READ)
                    answer = process.stdout.readline() if selector.select(_WAIT) else ""
            if not answer.endswith("\n"):
                failed = self.stop()
                return "jinja2 cannot be imported" if failed else f"it takes more than {_SECONDS} seconds"
        reason: str | None = json.loads(answer)
        return reason

    def _running(self) -> subprocess.Popen[str]:
        if self._owner != os.getpid():  # after a fork, the process belongs to the parent
            self._process, self._owner = None, os.getpid()
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # an interrupt must reach only the waiting process
            )
        return self._process

    def stop(self) -> bool:
        """End the process, if there is one, and return whether it had already failed without reaching a limit."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return False
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()  # ends the process, unless it is busy
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_ENDING)
        process.kill()
        process.stdout.close()
        return process.wait() > 0


_worker = _Worker()
atexit.register(_worker.stop)
