"""A view of a rewritten model, for notebooks, browsers and files."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from graftc.files.writing import staged
from graftc.runtime.view.page import page
from graftc.runtime.view.pictures import Shown, png, svg
from graftc.specs.errors.diagnostics import GraftError

HEIGHT = 640
"""The height of a page in a notebook, in pixels."""


class ModelView:
    """A view of a model, with the data that `graftc.runtime.view.contents.contents` describes.

    A notebook shows the page if the view is the value of a cell.

    Args:
        make: a function that creates the data; it is called when the data is first needed.
    """

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """All data that the page shows, in JSON form."""
        return self._make()

    @cached_property
    def html(self) -> str:
        """The page, as one self-contained file."""
        return page(self.data)

    def svg(self, mode: str = "eval", shown: Shown = "diff", opened: Any = "layer") -> str:
        """Return the graph as an SVG file, with the options of `graftc.runtime.view.pictures.svg`."""
        return svg(self.data, mode, shown, opened)

    def png(self, mode: str = "eval", shown: Shown = "diff", opened: Any = "layer") -> bytes:
        """Return the graph as a PNG file, with the options of `svg`."""
        return png(self.svg(mode, shown, opened))

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the page or a picture; the file's suffix selects the format: ``.html``, ``.svg`` or ``.png``.

        Args:
            path: the file.
            force: whether to replace an existing file.

        Raises:
            GraftError: GC091 for another suffix, GC061 if a package is missing, GC063 or GC064 if the file cannot be
                written.
        """
        place = Path(path)
        makers: dict[str, Callable[[], str | bytes]] = {
            ".html": lambda: self.html,
            ".svg": self.svg,
            ".png": self.png,
        }
        make = makers.get(place.suffix.lower())
        if make is None:
            message = f"{place.name!r} has a suffix that is not a known format"
            raise GraftError("GC091", message, hint=f"name it {place.stem}.html, .svg or .png")
        with staged(place, force=force) as file:
            content = make()
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        return place

    def _repr_html_(self) -> str:
        """Return the page in its own frame, which the notebook's other scripts cannot reach."""
        inner = html.escape(self.html, quote=True)
        size = f'width="100%" height="{HEIGHT}"'
        return f'<iframe {size} sandbox="allow-scripts allow-downloads" title="graph" srcdoc="{inner}"></iframe>'

    def __repr__(self) -> str:
        return f"ModelView of {self.data['title']}: use save('view.html') to write it as a page"
