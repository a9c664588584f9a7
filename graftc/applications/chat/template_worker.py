"""A separate process that tries out chat templates, which are third-party programs, in bounded time and memory.

`graftc.applications.chat.templates` runs it as a script, so it imports nothing from graftc. For each line of JSON that
it reads (a template, its variables, and limits on its output, time and memory), it writes a line of JSON: null, or the
reason why the template fails.
"""

from __future__ import annotations

import datetime
import json
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

if sys.platform != "win32":
    import resource


class _Generation(jinja2.ext.Extension):
    """The block ``{% generation %}``, which marks the assistant's text and renders as its contents."""

    tags = {"generation"}  # noqa: RUF012 - declared as in jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return an environment equivalent to the one in which transformers renders chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


def _limit(seconds: int, memory: int) -> None:
    """Limit processor time and memory to the given amounts beyond what is already in use."""
    if sys.platform == "win32":
        return  # the process that waits for the answer has its own time limit
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))
    try:
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _tried(asked: dict[str, Any]) -> str | None:
    length = 0
    try:
        for piece in _environment().from_string(asked["template"]).generate(**asked["given"]):
            length += len(piece)
            if length > asked["characters"]:
                return f"it produces more than {asked['characters']:,} characters"
    except MemoryError:
        return f"it uses more than {asked['memory'] // 2**20} MB of memory"
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return f"{type(error).__name__}: {lines[0][:300]}"
    return None


def main() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        _limit(asked["seconds"], asked["memory"])
        print(json.dumps(_tried(asked)), flush=True)


if __name__ == "__main__":
    main()
