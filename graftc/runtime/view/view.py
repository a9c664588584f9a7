"""A rewritten model to look at: in a notebook, in a browser, and as files."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from graftc.runtime.files import staged
from graftc.runtime.view.page import page
from graftc.runtime.view.pictures import Shown, png, svg
from graftc.specs.errors.diagnostics import GraftError

HEIGHT = 640
"""Pixels that a page is high in a notebook."""


class ModelView:
    """What a page shows: see `graftc.runtime.view.contents.contents`.

    A notebook shows the page where it is the value of a cell.

    Args:
        make: makes the data, when they are first asked for.
    """

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """All that the page shows, as JSON data."""
        return self._make()

    @cached_property
    def html(self) -> str:
        """The page: one self-contained file."""
        return page(self.data)

    def svg(self, mode: str = "eval", shown: Shown = "diff", opened: Any = "layer") -> str:
        """The graph as an SVG file: see `graftc.runtime.view.pictures.svg`."""
        return svg(self.data, mode, shown, opened)

    def png(self, mode: str = "eval", shown: Shown = "diff", opened: Any = "layer") -> bytes:
        """The graph as a PNG file: see `svg`."""
        return png(self.svg(mode, shown, opened))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the page, or a picture: the name's ending says which, ``.html``, ``.svg`` or ``.png``.

        Args:
            path: the file.
            force: replace one that is there.

        Raises:
            GraftError: GC091 for another ending, GC061 where a package is missing, GC063 and GC064 where the file
                cannot be written.
        """
        place = Path(path)
        makers: dict[str, Callable[[], str | bytes]] = {
            ".html": lambda: self.html,
            ".svg": self.svg,
            ".png": self.png,
        }
        make = makers.get(place.suffix.lower())
        if make is None:
            message = f"{place.name!r} has an ending that says no format"
            raise GraftError("GC091", message, hint=f"name it {place.stem}.html, .svg or .png")
        with staged(place, force=force) as file:
            made = make()
            file.write_bytes(made.encode() if isinstance(made, str) else made)
        return place

    def _repr_html_(self) -> str:
        """The page in a frame of its own, which no other script of the notebook can reach."""
        inner = html.escape(self.html, quote=True)
        size = f'width="100%" height="{HEIGHT}"'
        return f'<iframe {size} sandbox="allow-scripts allow-downloads" title="graph" srcdoc="{inner}"></iframe>'

    def __repr__(self) -> str:
        return f"ModelView of {self.data['title']}: save('view.html') writes it as a page"
