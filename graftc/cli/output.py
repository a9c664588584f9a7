"""The output of commands: tables for people, JSON for programs, and warnings on the standard error."""

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
from graftc.specs.errors.text import encodable, printable

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.records.passes import PassRecord


_PIPED_WIDTH = 120


def console(file: TextIO | None = None) -> Console:
    """Return a console on the standard output (or ``file``): colours on a terminal only, 120 columns elsewhere."""
    from graftc.cli.console import PlainConsole

    stream = sys.stdout if file is None else file
    # Rich keeps bold face without colours, but NO_COLOR means no escape codes at all.
    system: Literal["auto"] | None = None if without_colours() else "auto"
    plain = PlainConsole(file=stream, highlight=False, color_system=system)
    if not plain.is_terminal:
        # Rich would assume 80 columns, which folds tables although there is no window to fit.
        width = int(os.environ.get("COLUMNS", _PIPED_WIDTH))
        plain = PlainConsole(file=stream, highlight=False, color_system=system, width=width)
    return plain


def without_colours() -> bool:
    """Return whether NO_COLOR is set, which means that the user wants no escape codes."""
    return bool(os.environ.get("NO_COLOR"))


def error_console() -> Console:
    """Return a console on the standard error."""
    return console(sys.stderr)


def print_json(data: Mapping[str, Any]) -> None:
    """Print JSON on the standard output, one key a line.

    A value that JSON cannot represent is a bug, and does not become null.
    """
    text = json.dumps(encodable(data), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(encodable(data), indent=2, allow_nan=False)
    # Characters that JSON does not escape may still control a terminal.
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
    """Print a table. Text is printed literally, including brackets, and folded if it does not fit.

    Args:
        to: the console to print to.
        columns: the names of the columns.
        rows: rows with one text for each column.
        right: columns of numbers, which are aligned to the right.
        whole: columns that are not folded as long as they take at most half of the width.
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


def print_figures(passes: Iterable[PassRecord], to: Console) -> None:
    """Print the figures that passes of plugins report, and an empty line; print nothing if there are none."""
    from graftc.records.passes import FIGURE_COLUMNS, figure_rows

    rows = [row.cells() for row in figure_rows(passes)]
    if rows:
        print_table(to, FIGURE_COLUMNS, rows, right=FIGURE_COLUMNS[-1:])
        to.print()


def print_lines(to: Console, lines: Iterable[str], style: Callable[[str], str]) -> None:
    """Print lines without folding them, each in its style."""
    from rich.text import Text

    for line in lines:
        to.print(Text(printable(line), style(line)), soft_wrap=True)


def number(value: float) -> str:
    """Format a count for people: 56,098,816; a fraction keeps one digit."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


@contextlib.contextmanager
def working(as_json: bool) -> Iterator[list[dict[str, Any]]]:
    """Run a command's work with the standard output reserved for the command, and with warnings shown.

    What libraries and the user's model print goes to the standard error. Warnings of graftc go there as well, in the
    text form of diagnostics, or, with ``as_json``, into the list that is yielded. Warnings of libraries are dropped.
    """
    warned: list[dict[str, Any]] = []

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if not isinstance(message, GraftWarning):
            return
        if as_json:
            warned.append(message.to_json())
        else:
            print_coded(message, "yellow", prefix="warning ")

    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("always", GraftWarning)
        warnings.showwarning = show
        yield warned


@contextlib.contextmanager
def steps(as_json: bool) -> Iterator[Callable[[str], None]]:
    """Yield a function for the block to call with the name of each step, in lower case, as the step begins.

    A terminal shows the step on the standard error, with a spinner, until the next step or the end; for a compile that
    takes over two seconds it also shows the current phase. With ``as_json``, NO_COLOR or no terminal nothing is shown.
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
    """Begin a step, and return a function to call with the share of it that is done, from 0 to 1.

    Once the step has taken two seconds its name is shown with the time that is left, no more than twice a second.
    """
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
    """Begin a step of work on files, and return a function to call with the number of bytes done and their total.

    Like `time_left`, the step shows both with their rate and the time that is left. Bytes that were done before the
    first call do not count towards the rate.
    """
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
    """Print a diagnostic on the standard error, with its code in colour if there are colours."""
    from rich.text import Text

    text = Text(f"{prefix}{message}")
    head = str(text).find(":")
    text.stylize(f"bold {style}", 0, head + 1 if head > 0 else 0)
    with contextlib.suppress(OSError):  # there is nowhere left to report it
        error_console().print(text, soft_wrap=True)
