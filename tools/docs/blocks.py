"""Fenced blocks of Markdown pages, in order, with the comment that marks them; ``<!-- run -->`` marks those that run,
and ``<!-- walk -->`` those that only `make walk` runs: they take real models, engines, or pages before theirs.

``python blocks.py PAGE`` runs the marked blocks of a page, or the code of a notebook, in the current folder. This file
imports nothing of the repository, so that it can be run by an interpreter that has nothing else of it.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RUN = ("run", "walk")
"""The marks of blocks that run as scripts."""
NOTEBOOK = ".ipynb"

_SHELL = "_in_shell"
_COMMAND = re.compile(r"^!(.*)$", re.MULTILINE)
"""A line of a notebook that its shell runs."""

_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[\w: ]+) -->\n(?:<div[^>]*>\n\n)?)?"
    r"^(?P<ticks>`{3,})(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^(?P=ticks)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, line, language, title, text, and the comment before it (``<!-- run -->``)."""

    page: str
    line: int
    language: str
    title: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class CommandResult:
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Command:
    """A line of a console block that begins with ``$``.

    Attributes:
        place: its page and line.
        text: the line, joined with those that follow a backslash at its end.
        status: the exit status that it states (``# exit status 1``), by default 0.
        shown: the lines below it.
    """

    place: str
    text: str
    status: int
    shown: Sequence[str]


class BlockError(Exception):
    """A block does not do what its page says. The message begins with the page and the line."""


def blocks(page: str, language: str | None = None, folder: Path = DOCS) -> list[Block]:
    """Return the blocks of a page, given by its path in the docs folder or in another one.

    Those of a notebook are its cells of code, all of which run.
    """
    text = (folder / page).read_text(encoding="utf-8")
    if page.endswith(NOTEBOOK):
        return list(_cells(page, text))
    every = [
        Block(
            page, text.count("\n", 0, m.start("ticks")) + 1, m["language"], m["title"] or "", m["text"], m["mark"] or ""
        )
        for m in _FENCE.finditer(text)
    ]
    return [block for block in every if language in (None, block.language)]


def _cells(page: str, text: str) -> Iterator[Block]:
    """Yield the cells of code in a notebook, whose file has one line for each line of a cell."""
    seen = 0
    for cell in json.loads(text)["cells"]:
        source = cell["source"]
        if cell["cell_type"] != "code" or not source:
            continue
        seen = text.index(json.dumps(source[0], ensure_ascii=False), seen)
        code = _COMMAND.sub(lambda match: f"{_SHELL}({match[1]!r})", "".join(source))
        yield Block(page, text.count("\n", 0, seen), "python", "", f"{code}\n", RUN[0])


def pages() -> list[str]:
    """Return every page of the docs folder."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def run_block(block: Block, scope: dict[str, Any], run: Callable[[str], CommandResult]) -> None:
    """Run a block in the current folder.

    A block with a title is written to a file of that name, a Python block is executed, and the commands of any other
    block are run.

    Args:
        block: the block.
        scope: the variables of the page's Python blocks.
        run: runs a command, given as a line.

    Raises:
        BlockError: a command ends with another status than stated, or does not print the lines below it. Dots stand for
            omitted lines, or for the rest of a line.
    """
    if block.title:
        Path(block.title).parent.mkdir(parents=True, exist_ok=True)
        Path(block.title).write_text(block.text, encoding="utf-8")
    elif block.language == "python":
        # Lines of a traceback are those of the page.
        tree = ast.parse("\n" * block.line + block.text, block.page)
        last = tree.body.pop() if block.page.endswith(NOTEBOOK) and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, block.page, "exec"), scope)
        if isinstance(last, ast.Expr):
            _display(eval(compile(ast.Expression(last.value), block.page, "eval"), scope))
    else:
        for command in commands_of(block):
            _compare(command, run(command.text))


def commands_of(block: Block) -> Iterator[Command]:
    """Yield the commands of a console block."""
    lines = block.text.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        text, rest = lines[start].removeprefix("$ "), lines[start + 1 : end]
        while text.endswith("\\") and rest:
            text = text[:-1] + rest.pop(0).strip()
        stated = re.search(r"# exit status (\d+)", text)
        yield Command(f"{block.page}:{block.line + 1 + start}", text, int(stated[1]) if stated else 0, rest)


def _compare(command: Command, result: CommandResult) -> None:
    if result.status != command.status:
        raise BlockError(
            f"{command.place}: {command.text}\nended with status {result.status}\n{result.out}{result.err}"
        )
    out = iter(_spaced(line) for line in result.out.splitlines())
    for expected in (_spaced(line) for line in command.shown if line != "..."):
        expected = expected.removesuffix("...").rstrip()
        if not any(line.startswith(expected) for line in out):
            raise BlockError(f"{command.place}: {command.text}\nprinted no {expected!r}:\n{result.out}")


def _spaced(line: str) -> str:
    return re.sub(r" +", " ", line).strip()


def _display(value: Any) -> None:
    """Show the value of a notebook cell's last line; of HTML, which notebooks prefer, only the size."""
    if hasattr(value, "_repr_html_"):
        print(f"{type(value).__name__}: {len(value._repr_html_()):,} characters of HTML")
    elif value is not None:
        print(repr(value))


def _without_failure(line: str) -> None:
    """Run a line of a notebook in a shell.

    Raises:
        RuntimeError: if it does not end with status 0.
    """
    result = in_shell(line)
    if result.status:
        raise RuntimeError(f"{line} ended with status {result.status}")


def in_shell(line: str) -> CommandResult:
    """Run a line in a shell, show what it prints, and return it."""
    print(f"$ {line}", flush=True)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="", end="", flush=True)
    return CommandResult(done.returncode, done.stdout, done.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the blocks of a page in the current folder, and return the exit status: 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder from which places are named")
    parser.add_argument("--first", metavar="LANGUAGE", help="run the first block of a language, marked or not")
    parser.add_argument("--wrong", type=Path, metavar="FILE", help="write what is wrong to a file as well")
    options = parser.parse_args(arguments)
    wrong = run_page(os.path.relpath(options.page, options.root), options.root.resolve(), options.first)
    if wrong and options.wrong:
        options.wrong.write_text(wrong, encoding="utf-8")
    if wrong:
        print(f"wrong: {wrong}", file=sys.stderr)
    return int(bool(wrong))


def run_page(page: str, folder: Path, first: str | None = None) -> str:
    """Run the marked blocks of a page, or the first block of a language; return what is wrong, with its place."""
    every = blocks(page, first, folder)
    chosen = [block for block in every if block.mark in RUN] if first is None else every[:1]
    if not chosen:
        return f"{page}: no block is marked to run" if first is None else f"{page}: no block is {first}"
    sys.path.insert(0, "")  # what a page has written to files can be imported
    scope: dict[str, Any] = {"__name__": page, _SHELL: _without_failure}
    for block in chosen:
        print(f"== {block}: {block.title or block.language}", flush=True)
        try:
            run_block(block, scope, in_shell)
        except BlockError as error:
            return str(error)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            return f"{page}:{_line(error, page) or block.line}: {type(error).__name__}: {error}"
    return ""


def _line(error: BaseException, page: str) -> int | None:
    """Return the line of a page that an error is from."""
    if isinstance(error, SyntaxError) and error.filename == page:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == page]
    return lines[-1] if lines else None


if __name__ == "__main__":
    sys.exit(main())
