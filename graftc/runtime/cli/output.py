"""How commands print: tables for people, JSON for programs, warnings beside them."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TextIO

from graftc.passes.core.progress import listening
from graftc.specs.errors.diagnostics import GraftWarning
from graftc.specs.errors.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.passes.core.pass_context import PassRecord
    from graftc.runtime.cli.results.base import Result

__all__ = [
    "console",
    "error_console",
    "number",
    "print_coded",
    "print_json",
    "print_lines",
    "print_table",
    "steps",
    "throughput",
    "time_left",
    "without_colours",
    "working",
]

_PIPED_WIDTH = 120


def console(file: TextIO | None = None) -> Console:
    """A console on the standard output (or ``file``): colours on a terminal only, 120 columns elsewhere."""
    from graftc.runtime.cli.console import PlainConsole

    stream = sys.stdout if file is None else file
    # Rich keeps bold face without colours; whoever sets NO_COLOR wants no escape codes at all.
    system: Literal["auto"] | None = None if without_colours() else "auto"
    found = PlainConsole(file=stream, highlight=False, color_system=system)
    if not found.is_terminal:
        # Rich would take 80 columns, which folds tables that nobody looks at through a window.
        width = int(os.environ.get("COLUMNS", _PIPED_WIDTH))
        found = PlainConsole(file=stream, highlight=False, color_system=system, width=width)
    return found


def without_colours() -> bool:
    """Whether the user wants no escape codes: NO_COLOR is set."""
    return bool(os.environ.get("NO_COLOR"))


def error_console() -> Console:
    """A console on the standard error."""
    return console(sys.stderr)


def print_json(result: Result | Mapping[str, Any]) -> None:
    """Print JSON on the standard output, one key a line. What JSON cannot hold is a bug, not null."""
    data = result if isinstance(result, Mapping) else result.to_json()
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2, allow_nan=False)
    # What JSON leaves as it is may still steer a terminal.
    sys.stdout.write(printable(text, r"\u{:04x}") + "\n")
    sys.stdout.flush()


def print_table(
    to: Console,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> None:
    """Print a table. Text is taken as it is, brackets included, and folded where it does not fit.

    Args:
        to: where.
        columns: their names.
        rows: one text for each column.
        right: columns that hold numbers.
        whole: columns that are not folded while they take at most half of the width.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    lines = list(rows)
    for index, name in enumerate(columns):
        longest = max((len(line[index]) for line in lines), default=0)
        table.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=name in whole and longest <= to.width // 2,
        )
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))
    to.print(table)


def print_figures(passes: Iterable[PassRecord]) -> None:
    """Print what passes of plugins report, and an empty line; nothing where they report nothing."""
    from graftc.compiler.inspect.pass_figures import COLUMNS, figure_rows

    rows = [row.cells() for row in figure_rows(passes)]
    if rows:
        print_table(console(), COLUMNS, rows, right=COLUMNS[-1:])
        console().print()


def print_lines(to: Console, lines: Iterable[str], style: Callable[[str], str]) -> None:
    """Print lines as they are, however long, each in its style."""
    from rich.text import Text

    for line in lines:
        to.print(Text(printable(line), style(line)), soft_wrap=True)


def number(value: float) -> str:
    """A count for people: 56,098,816; a fraction keeps one digit."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


@contextlib.contextmanager
def working(as_json: bool) -> Iterator[list[dict[str, Any]]]:
    """Around a command's work: the standard output stays the command's own, and warnings reach people.

    What libraries and the user's model print goes to the standard error. Warnings of graftc go there too, in the
    text form of diagnostics, or, with ``as_json``, into the list that is yielded. Warnings of libraries are dropped.
    """
    found: list[dict[str, Any]] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if not isinstance(message, GraftWarning):
            return
        if as_json:
            found.append(message.to_json())
        else:
            print_coded(message, "yellow", prefix="warning ")

    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always", GraftWarning)
        warnings.showwarning = show
        yield found


@contextlib.contextmanager
def steps(as_json: bool) -> Iterator[Callable[[str], None]]:
    """Around long work: yields what is called with the name of each step, in lower case, as it begins.

    A terminal shows the step on the standard error, beside something that turns, until the next one or the end; of a
    compile that takes over two seconds also what it is at.
    With ``as_json``, NO_COLOR or no terminal nothing is shown.
    """
    if as_json or without_colours() or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        with listening(lambda *_: None):
            yield lambda _: None
        return
    from rich.status import Status
    from rich.text import Text

    status = Status("", console=error_console(), spinner="dots")
    current = ""

    def step(text: str) -> None:
        nonlocal current
        current = text
        status.update(Text(f"{text} ..."))
        status.start()

    try:
        with listening(
            lambda at, seconds: status.update(Text(f"{': '.join(filter(None, (current, at)))}, {seconds:.0f} s"))
        ):
            yield step
    finally:
        status.stop()


def time_left(
    step: Callable[[str], None], name: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[float], None]:
    """Begin a step; what is given back is told how much of it is done, from 0 to 1. Once the step has taken two seconds
    its name is shown with the time that is left, no more than twice a second."""
    begun = shown = clock()
    step(name)

    def advance(done: float) -> None:
        nonlocal shown
        now = clock()
        if now - begun < 2 or now - shown < 0.5 or not 0 < done < 1:
            return
        shown = now
        left = round((now - begun) * (1 - done) / done)
        step(f"{name}, {left} s left" if left < 120 else f"{name}, {round(left / 60)} min left")

    return advance


def throughput(
    step: Callable[[str], None], name: str, clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Like `time_left` for work on files: what is given back is told how many bytes are done, and how many there are,
    and the step shows these with their rate and the time that is left. What was done before counts for nothing."""
    begun = shown = clock()
    first: int | None = None
    step(name)

    def advance(done: int, size: int) -> None:
        nonlocal shown, first, begun
        now = clock()
        if first is None:
            first, begun = done, now
        if now - begun < 2 or now - shown < 0.5 or not first < done < size:
            return
        shown = now
        rate = (done - first) / (now - begun)
        left = round((size - done) / rate)
        time_of = f"{left} s left" if left < 120 else f"{round(left / 60)} min left"
        step(f"{name}, {done / 1e9:.1f} of {size / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {time_of}")

    return advance


def print_coded(message: object, style: str, prefix: str = "") -> None:
    """A diagnostic on the standard error, its code in colour where there are colours."""
    from rich.text import Text

    text = Text(f"{prefix}{message}")
    head = str(text).find(":")
    text.stylize(f"bold {style}", 0, head + 1 if head > 0 else 0)
    with contextlib.suppress(OSError):  # there is nobody left to tell
        error_console().print(text, soft_wrap=True)
