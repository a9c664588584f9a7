"""An export format as data: its name, its options, and the functions that write a file and check it. No torch."""

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
    """A function that is imported when it is first called, so that naming it loads no torch.

    Attributes:
        place: its module and its name, such as ``"graftc.runtime.export.onnx:write"``.
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
        meaning: what it says, in one sentence without a full stop.
        words: the words that it may have; empty for other values.
        read: a function that returns the value of the option for a given one, or raises, such as ``int``. The command
            line gives texts. By default one of the words, or any value if there are none.
        default: the value if none is given.
        flag: the option of its own that it has on the command line; empty for ``--option NAME=VALUE``.
    """

    name: str
    meaning: str
    words: tuple[str, ...] = ()
    read: Callable[[Any], Any] | None = None
    default: Any = None
    flag: str = ""

    @property
    def help(self) -> str:
        """The meaning with the words that the option may have."""
        words = [f"{word}, which is the default" if word == self.default else word for word in self.words]
        return f"{self.meaning}{': ' if words else ''}{listed(words, 'or')}."

    def checked(self, value: Any) -> Any:
        """Return the value of the option for a given one.

        Raises:
            GraftError: GC073 for a value that the option does not allow, or what `read` raises.
        """
        try:
            if self.read is not None:
                return self.read(value)
            if not self.words or value in self.words:
                return value
        except (TypeError, ValueError):
            pass
        hint = f"give {listed(self.words, 'or')}" if self.words else self.meaning
        raise GraftError("GC073", f"{self.name} is {shown(value)}", hint=hint)


@dataclass(frozen=True)
class Exporter:
    """One export format.

    Functions of a job that refuse it raise `GraftError`. What they raise otherwise is reported as a fault of the
    package that the exporter comes from (GC078).

    Attributes:
        name: its name, which is also that of its entry point.
        summary: what it writes, in one sentence without a full stop.
        options: its options.
        write: a function that writes a job to a path where nothing exists: a file, or a folder, which it creates. The
            path has the name of the destination, and is put in its place when it is complete and checked.
        check: a function that reads back what has been written to the path, and raises if it is not right.
        prepare: a function that refuses a job before anything is written, also with ``--dry-run``; what it returns is
            ``prepared`` of the job.
        content: whether it writes whole models, or the adapters alone of models that are not folded; ``"either"``:
            folded models, and the adapters of others.
        replaceable: a predicate of paths that ``force`` may replace; by default of files.
        companions: a function that returns names of files that may be written beside a path, with some options.
        instead: what to do instead, for options that users may well expect of it.
        origin: the package that it comes from; None for graftc itself. It is filled in.
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
        """Whether adaptations can be folded first."""
        return self.content != "adapters"

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of options that are not given."""
        return {option.name: option.default for option in self.options}

    def failed(self, reason: str) -> GraftError:
        """Return the error for a plugin's exporter that does not do its work."""
        assert self.origin is not None
        return self.origin.error("GC078", f"the exporter {self.name!r} of {self.origin} failed: {reason}")

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Report what a plugin's exporter raises while the block runs, unless it is a `GraftError`.

        Raises:
            GraftError: GC078.
        """
        try:
            yield
        except Exception as error:  # a plugin may fail in any way, and the message must name it
            if self.origin is None or isinstance(error, GraftError):
                raise
            raise self.failed(first_line(error)) from error
