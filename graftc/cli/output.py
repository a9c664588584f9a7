"""The output of commands: tables for people, JSON for programs, and warnings on stderr."""

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
    """Return a console for stdout (or ``file``), with colours only on a terminal and 120 columns elsewhere."""
    from graftc.cli.plain_console import PlainConsole

    stream = sys.stdout if file is None else file
    # Without colours, Rich still emits bold face, but NO_COLOR means no escape codes at all.
    system: Literal["auto"] | None = None if without_colours() else "auto"
    plain = PlainConsole(file=stream, highlight=False, color_system=system)
    if not plain.is_terminal:
        # Rich would assume 80 columns and fold tables, although there is no window to fit into.
        width = int(os.environ.get("COLUMNS", _PIPED_WIDTH))
        plain = PlainConsole(file=stream, highlight=False, color_system=system, width=width)
    return plain


def without_colours() -> bool:
    """Return whether NO_COLOR is set, which means that the user wants no escape codes."""
    return bool(os.environ.get("NO_COLOR"))


def error_console() -> Console:
    """Return a console for stderr."""
    return console(sys.stderr)


def print_json(data: Mapping[str, Any]) -> None:
    """Print JSON to stdout, with one key per line.

    A value that JSON cannot represent is a bug: it raises an error instead of becoming null.
    """
    text = json.dumps(encodable(data), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(encodable(data), indent=2, allow_nan=False)
    # Some characters that JSON does not escape can still control a terminal.
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
    """Print a table. Text is printed literally, including brackets, and wrapped if it does not fit.

    Args:
        to: the console to print to.
        columns: the names of the columns.
        rows: the rows, each with a text for every column.
        right: the right-aligned columns, such as those with numbers.
        whole: the columns that are not wrapped as long as each takes at most half of the console's width.
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
    """Print the figures that plugins' passes report, followed by an empty line; print nothing if there are none."""
    from graftc.records.passes import FIGURE_COLUMNS, figure_rows

    rows = [row.cells() for row in figure_rows(passes)]
    if rows:
        print_table(to, FIGURE_COLUMNS, rows, right=FIGURE_COLUMNS[-1:])
        to.print()


def print_lines(to: Console, lines: Iterable[str], style: Callable[[str], str]) -> None:
    """Print lines without wrapping them, each in its own style."""
    from rich.text import Text

    for line in lines:
        to.print(Text(printable(line), style(line)), soft_wrap=True)


def number(value: float) -> str:
    """Format a count for people, such as 56,098,816; a value that is not an integer keeps one decimal."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


@contextlib.contextmanager
def working(as_json: bool) -> Iterator[list[dict[str, Any]]]:
    """Run a command's work with stdout reserved for the command, and with warnings shown.

    Anything that libraries and the user's model print is redirected to stderr. graftc's warnings are printed to stderr
    as well, in the text form of diagnostics, or, with ``as_json``, appended to the list that is yielded. Warnings from
    libraries are dropped.
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
    """Yield a function that the block calls with the name of each step, in lower case, when the step begins.

    If stderr is a terminal, it shows the step with a spinner until the next step or the end, and also the current phase
    of a compile that takes more than two seconds. Otherwise, or with ``as_json`` or NO_COLOR, nothing is shown.
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
    """Begin a step, and return a function to call with the completed share of the step, from 0 to 1.

    Once the step has taken two seconds, its name is shown with the remaining time, at most twice a second.
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
    """Begin a step that processes files, and return a function to call with the completed and total number of bytes.

    As with `time_left`, the step is shown with its progress: both numbers, the rate and the remaining time. Bytes
    completed before the first call do not count towards the rate.
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
    """Print a diagnostic to stderr, with its code in colour if colours are enabled."""
    from rich.text import Text

    text = Text(f"{prefix}{message}")
    head = str(text).find(":")
    text.stylize(f"bold {style}", 0, head + 1 if head > 0 else 0)
    with contextlib.suppress(OSError):  # there is nowhere left to report it
        error_console().print(text, soft_wrap=True)
