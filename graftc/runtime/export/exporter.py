"""An export format as data: its name, options, and functions that write and check a file. Does not load torch."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.errors.text import listed, shown

if TYPE_CHECKING:
    from graftc.passes.core.plugins import Plugin
    from graftc.runtime.export.job import ExportJob


@dataclass(frozen=True)
class LazyFunction:
    """A function that is imported when it is first called, so that referring to it does not load torch.

    Attributes:
        place: its module and name, such as ``"graftc.runtime.export.onnx:write"``.
    """

    place: str

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return pkgutil.resolve_name(self.place)(*args)


@dataclass(frozen=True)
class ExportOption:
    """One option of a format.

    Attributes:
        name: its name in Python, and in ``--option NAME=VALUE``.
        meaning: a description, in one sentence without a full stop.
        words: the allowed words; empty if the values are not words.
        read: a function that converts a given value to the option's value or raises, such as ``int``. The command line
            passes strings. By default, one of the words is required, or any value is accepted if there are none.
        default: the value if none is given.
        flag: its dedicated command line option; empty for ``--option NAME=VALUE``.
        needs: the name of the option without which it has no effect; empty if it always has one.
    """

    name: str
    meaning: str
    words: tuple[str, ...] = ()
    read: Callable[[Any], Any] | None = None
    default: Any = None
    flag: str = ""
    needs: str = ""

    @property
    def help(self) -> str:
        """The meaning, followed by the allowed words."""
        words = [f"{word}, which is the default" if word == self.default else word for word in self.words]
        return f"{self.meaning}{': ' if words else ''}{listed(words, 'or')}."

    def checked(self, value: Any) -> Any:
        """Check a given value, and return it converted.

        Raises:
            GraftError: GC073 for a value that the option does not allow, or an error from `read`.
        """
        reason = ""
        try:
            if self.read is not None:
                return self.read(value)
            if not self.words or value in self.words:
                return value
        except (TypeError, ValueError) as error:
            reason = f": {error}" if str(error) else ""
        hint = f"use {listed(self.words, 'or')}" if self.words else self.meaning
        raise GraftError("GC073", f"{self.name} is {shown(value)}{reason}", hint=hint)


@dataclass(frozen=True)
class Exporter:
    """One export format.

    Its functions take a job, and raise `GraftError` to refuse it. Any other exception is reported as a fault in the
    package that the exporter comes from (GC078).

    Attributes:
        name: its name, which is also the name of its entry point.
        summary: what it writes, in one sentence without a full stop.
        options: its options.
        write: a function that writes a job to a path where nothing exists: a file, or a folder, which it creates. The
            path has the destination's name, and is moved there once it is complete and checked.
        check: a function that reads back what was written to the path, and raises if it is wrong.
        prepare: a function that may refuse a job before anything is written, even with ``--dry-run``; its result
            becomes the job's ``prepared``.
        content: what it writes: whole models (``"model"``), only the adapters of models that are not folded
            (``"adapters"``), or both folded models and the adapters of others (``"either"``).
        replaceable: a predicate for paths that ``force`` may replace; files by default.
        companions: a function that returns the names of files that may be written beside a path with given options.
        instead: remedies for options that users may expect the format to have, by option.
        origin: the package that it comes from; None for graftc itself. It is set by the registry.
    """

    name: str
    summary: str
    options: tuple[ExportOption, ...]
    write: Callable[[ExportJob, Path], object]
    check: Callable[[ExportJob, Path], object] = lambda job, path: None
    prepare: Callable[[ExportJob], Any] = lambda job: None
    content: Literal["model", "adapters", "either"] = "model"
    replaceable: Callable[[Path], bool] = Path.is_file
    companions: Callable[[Path, Mapping[str, Any]], Sequence[str]] = lambda path, options: ()
    instead: Mapping[str, str] = field(default_factory=dict)
    origin: Plugin | None = None

    @property
    def folds(self) -> bool:
        """Whether adaptations can be folded before the export."""
        return self.content != "adapters"

    @property
    def defaults(self) -> dict[str, Any]:
        """The options' default values."""
        return {option.name: option.default for option in self.options}

    def failed(self, reason: str) -> GraftError:
        """Return the error for a plugin's exporter that failed."""
        assert self.origin is not None
        return self.origin.error("GC078", f"the exporter {self.name!r} of {self.origin} failed: {reason}")

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Turn any exception that a plugin's exporter raises in the block, except `GraftError`, into a coded error.

        Raises:
            GraftError: GC078.
        """
        try:
            yield
        except (Exception, SystemExit) as error:  # a plugin may fail in any way, and the message must name it
            if self.origin is None or isinstance(error, GraftError):
                raise
            raise self.failed(first_line(error)) from error
