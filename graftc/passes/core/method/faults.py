"""Exceptions in the code of a method, which may come from another package: errors that name it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from graftc.passes.core.sites.sites import Site
from graftc.specs.errors.diagnostics import GraftError, first_line


@contextmanager
def inserting(method: str, site: Site | None = None) -> Iterator[None]:
    """Inside, a method prepares an adaptation, or inserts it at a site.

    Raises:
        GraftError: GC071 naming the method and the site for every exception that is no coded error.
    """
    try:
        yield
    except GraftError:
        raise
    except Exception as error:  # whatever a method does wrong, its message has to name it
        what = f"{method!r} cannot be inserted" + (f" at {site.key}" if site is not None else "")
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise GraftError("GC071", f"{what}: {reason}", hint="correct the method; nothing has been compiled") from error
