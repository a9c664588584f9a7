"""Insert an adaptation: prepare it once for all of its sites, then insert it at each site.

Methods may come from other packages, so an exception in one becomes an error that names the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.method.steering import STEP, no_steps
from graftc.passes.core.sites.sites import Site
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, first_line


def prepare(spec: MethodSpec, sites: Sequence[Site], build: Builder) -> Any:
    """Return the result of `Method.prepare`, which all sites of the adaptation share.

    If the method's controller has anything to do, also create the counter of optimiser steps.

    Raises:
        GraftError: GC071 naming the method for every exception that is not a coded error.
    """
    method = method_for(spec.method)
    if method.controller is not None and method.controller.wanted(spec):
        build.keep_buffer(STEP, no_steps)
    with _inserting(spec.method):
        return method.prepare(spec, sites, build)


def insert_at(spec: MethodSpec, site: Site, shared: Any, build: Builder) -> None:
    """Call `Method.insert`, inside ``build.on(site)``.

    Raises:
        GraftError: as for `prepare`, also naming the site.
    """
    with build.on(site), _inserting(spec.method, f" at {site.key}"):
        method_for(spec.method).insert(spec, site, shared, build)


@contextmanager
def _inserting(method: str, where: str = "") -> Iterator[None]:
    try:
        yield
    except GraftError:
        raise
    except Exception as error:  # the message must name the method, whatever fails in it
        message = f"{method!r} cannot be inserted{where}: {first_line(error)}"
        raise GraftError("GC071", message, hint="correct the method; nothing has been compiled") from error
