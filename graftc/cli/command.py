"""The decorator that builds a command from two functions: one that returns a record, and one that shows it.

It handles everything that commands have in common: ``--json``, warnings, the steps shown on a terminal, the exit
status, and, for commands that write a folder or a file, ``--out``, ``--dry-run`` and ``--force``. `graftc.cli.main`
shows errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import update_wrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_type_hints

import typer

from graftc.cli.options import DryRun, Force, Json, Out, destination

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.records.files import WrittenFile


R = TypeVar("R")


@dataclass
class CommandRun:
    """One run of a command.

    Attributes:
        as_json: whether the result is printed as JSON.
        out: the path to write to; None with ``--dry-run``, and for commands that have no ``--out``.
        dry_run, force: whether to write nothing, and whether to replace existing files.
        step: a function to call with the name of each step, in lower case, when the step begins.
        warnings: the warnings so far.
        beside: the names of companion files that are written next to a file.
        status: the exit status if nothing fails.
    """

    as_json: bool
    out: Path | None = None
    dry_run: bool = False
    force: bool = False
    step: Callable[[str], None] = lambda _: None
    warnings: list[dict[str, Any]] = field(default_factory=list)
    beside: Sequence[str] = ()
    status: int = 0

    def require_destination(self, *sources: Path | str | None, **options: Any) -> None:
        """Check, before the work begins, that the destination is writable and does not overlap the sources.

        Args:
            sources: the paths that the command reads.
            options: as for `graftc.files.destinations.check_destination`.

        Raises:
            GraftError: GC063 or GC064.
        """
        from graftc.files.writing import check_apart, check_destination

        if self.out is not None:
            check_apart(self.out, *sources)
            check_destination(self.out, force=self.force, companions=self.beside, **options)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Run the block with warnings collected or shown, steps shown, and the output of libraries redirected."""
        from graftc.cli.output import steps, working

        with working(self.as_json) as self.warnings, steps(self.as_json) as self.step:
            yield

    @property
    def files(self) -> tuple[WrittenFile, ...]:
        """The files at the destination."""
        from graftc.records.files import WrittenFile

        if self.out is None:
            return ()
        path = self.out
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files += [beside for name in self.beside if (beside := path.with_name(name)).is_file()]
        return tuple(WrittenFile(file.as_posix(), file.stat().st_size) for file in files)


class Command(Generic[R]):
    """A command, which Typer calls with its options.

    Args:
        function: the function that returns the record; its first parameter is the `CommandRun`.
        writes: whether the command has ``--out``, ``--dry-run`` and ``--force``.
        live: whether the function calls `CommandRun.working` itself, around its work.
        foreign: whether options that the command does not have go to its last argument, a list.
    """

    def __init__(self, function: Callable[..., R], *, writes: bool, live: bool, foreign: bool = False) -> None:
        self.function, self._writes, self._live = function, writes, live
        self.settings = {"ignore_unknown_options": True} if foreign else {}
        self._show: Callable[[R, Console], None] | None = None
        update_wrapper(self, function)
        options = {"json": (Json, False)}
        if writes:
            options = {"dry_run": (DryRun, False), "force": (Force, False), **options}
        parameters = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        if writes:
            required = sum(each.default is each.empty for each in parameters)
            parameters.insert(required, inspect.Parameter("out", _KEYWORD, default=None, annotation=Out))
        parameters += [inspect.Parameter(n, _KEYWORD, default=d, annotation=a) for n, (a, d) in options.items()]
        self.__signature__ = inspect.Signature([each.replace(kind=_KEYWORD) for each in parameters])
        self.__annotations__ = {each.name: each.annotation for each in parameters}
        vars(self).pop("__wrapped__")  # the wrapped function has a different signature

    @property
    def result(self) -> Any:
        """The type of the record."""
        return get_type_hints(self.function)["return"]

    def shows(self, show: Callable[[R, Console], None]) -> Callable[[R, Console], None]:
        """Register the function that shows a record to people; used as a decorator."""
        self._show = show
        return show

    def __call__(self, *, json: bool = False, **options: Any) -> None:
        """Run the command, and print its record.

        Raises:
            GraftError: GC090 if ``--out`` is missing.
            Exit: if the exit status is not 0.
        """
        from graftc.cli.output import console, print_json

        run = CommandRun(json)
        if self._writes:
            run.dry_run, run.force = options.pop("dry_run"), options.pop("force")
            run.out = destination(options.pop("out"), dry_run=run.dry_run)
        if self._live:
            result = self.function(run, **options)
        else:
            with run.working():
                result = self.function(run, **options)
        result = self._completed(result, run)
        if json or self._show is None:
            print_json(result if isinstance(result, Mapping) else cast("Any", result).to_json())
        else:
            self._show(result, console())
        if run.status:
            raise typer.Exit(run.status)

    def _completed(self, result: R, run: CommandRun) -> R:
        """Return the record with the fields that all commands share filled in."""
        from graftc.records.diagnostics import Diagnostic

        record: Any = result
        common: dict[str, Any] = {"warnings": tuple(Diagnostic(**each) for each in run.warnings)}
        if self._writes:
            common |= {"out": None if run.out is None else str(run.out), "dry_run": run.dry_run, "files": run.files}
        fields = getattr(record, "__dataclass_fields__", {})
        known = {name: value for name, value in common.items() if name in fields}
        return cast("R", replace(record, **known)) if known else result


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def command(
    *, writes: bool = False, live: bool = False, foreign: bool = False
) -> Callable[[Callable[..., R]], Command[R]]:
    """Return a decorator that turns a function into a `Command`."""
    return lambda function: Command(function, writes=writes, live=live, foreign=foreign)
