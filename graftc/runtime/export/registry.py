"""Find the export formats: built-in ones, and those in the entry-point group ``graftc.exporters``. Loads no torch.

An entry point has the format's name and refers to its `Exporter`, as in ``shapes = "graftc_shapes:SHAPES"``. The names
come from metadata alone; an exporter is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from graftc.passes.core.plugins import plugin_of
from graftc.runtime.export import formats as package
from graftc.runtime.export.exporter import Exporter, ExportOption
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.errors.text import listed

GROUP = "graftc.exporters"
"""The entry-point group."""


@cache
def _points() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Return the entry points by name: the built-in ones in order, then the plugins', which may reuse a name."""
    own = [EntryPoint(n, f"{package.__name__}.{n.replace('-', '_')}:EXPORTER", GROUP) for n in package.BUILT_IN]
    points: dict[str, tuple[EntryPoint, ...]] = {}
    for point in [*own, *sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))]:
        points[point.name] = (*points.get(point.name, ()), point)
    return points


def formats() -> tuple[str, ...]:
    """Return the names of all formats. They are looked up once; `reload_exporters` discards the result."""
    return tuple(_points())


def summaries() -> dict[str, str]:
    """Return each format's summary, by name; for plugins, which are not imported here, name the package instead."""
    firsts = {name: points[0] for name, points in _points().items()}
    return {n: _loaded(p).summary if n in package.BUILT_IN else f"of {plugin_of(p)}" for n, p in firsts.items()}


def exporter_of(format: Any) -> Exporter:
    """Return the exporter of a format.

    Raises:
        GraftError: GC060 if the format is unknown, GC078 if a plugin's entry point is broken or reuses a name.
    """
    points = _points().get(format) if isinstance(format, str) else None
    if points is None:
        raise _unknown(format)
    if len(points) > 1:
        one = "graftc" if format in package.BUILT_IN else str(plugin_of(points[0]))
        other = str(plugin_of(points[1]))
        message = f"the format {format!r} is registered twice, by {one} and by {other}"
        raise plugin_of(points[-1]).error("GC078", message)
    return _loaded(points[0])


def exporters() -> dict[str, Exporter]:
    """Return the exporters of all formats, except broken ones, which are reported when they are used."""
    every = {}
    for name in formats():
        with suppress(GraftError):
            every[name] = exporter_of(name)
    return every


def reload_exporters() -> None:
    """Forget the exporters found so far, so that packages installed since then are found."""
    for function in (_points, _loaded):
        function.cache_clear()


@cache
def _loaded(point: EntryPoint) -> Exporter:
    plugin = None if point.name in package.BUILT_IN else plugin_of(point)
    try:
        loaded: Any = point.load()
    except (Exception, SystemExit) as error:  # an import may fail in any way, and the message must name the plugin
        if plugin is None:
            raise
        raise plugin.error("GC078", f"{plugin} cannot be imported: {first_line(error)}") from error
    is_exporter = isinstance(loaded, Exporter) and all(isinstance(each, ExportOption) for each in loaded.options)
    if plugin is not None and (not is_exporter or loaded.name != point.name):
        shown = f"the exporter {loaded.name!r}" if is_exporter else f"something {kind_of(loaded)}"
        hint = f'name an Exporter("{point.name}", ...) with ExportOption(...) as options'
        raise plugin.error("GC078", f"{plugin} registers {shown} as {point.name!r}", hint)
    exporter: Exporter = replace(loaded, origin=plugin)
    return exporter


def _unknown(format: Any) -> GraftError:
    own = [_loaded(_points()[name][0]) for name in package.BUILT_IN]
    graphs, adapters, both = ([e.name for e in own if e.content == kind] for kind in ("model", "adapters", "either"))
    hint = (
        f"graphs are {listed(graphs, 'or')}; adapters and merged models may also be {listed([*adapters, *both], 'or')}"
    )
    added = [name for name in formats() if name not in package.BUILT_IN]
    hint += f"; installed packages add {', '.join(added)}" if added else ""
    return GraftError("GC060", f"format {format!r} is unknown", hint=hint)
