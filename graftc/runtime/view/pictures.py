"""Draw pictures of a rewritten graph with the page's layout, by running the page's own code without a browser."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from graftc.runtime.view.page import PICTURES, asset
from graftc.specs.errors.diagnostics import GraftError

FONTS = "Roboto, Arial, 'Liberation Sans', 'DejaVu Sans', 'Noto Sans', 'Segoe UI', 'Helvetica Neue', sans-serif"
"""The fonts for text; the first installed font is used."""

Shown = Literal["after", "before", "diff"]
LARGEST = 30_000_000
"""The maximum number of pixels in a PNG file; a larger graph gets fewer pixels per unit of length."""


def svg(data: Mapping[str, Any], mode: str = "eval", shown: Shown = "diff", opened: Any = "layer") -> str:
    """Return the graph as an SVG file.

    Args:
        data: the result of `graftc.runtime.view.contents.contents`.
        mode: the mode of the graph to draw.
        shown: the rewritten graph, the base's own, or both with the differences marked.
        opened: the paths of the modules whose contents are shown; ``layer`` opens the first of several equal layers,
            and the modules within it that contain inserted nodes.

    Raises:
        GraftError: GC061 if QuickJS is missing.
    """
    try:
        import quickjs
    except ModuleNotFoundError:
        raise GraftError("GC061", "pictures need the package quickjs-ng", hint="pip install 'graftc[view]'") from None
    context = quickjs.Context()
    for name in PICTURES:
        context.eval(asset(name))
    options = {"mode": mode, "view": shown, "open": opened, "theme": "light"}
    context.set("given", json.dumps({"data": data, "options": options}, allow_nan=False))
    context.eval("const {data: graftcData, options: graftcOptions} = JSON.parse(given)")
    return str(context.eval("graftcSvg(graftcData, graftcOptions)"))


def png(text: str, zoom: float = 2.0) -> bytes:
    """Convert an SVG file to a PNG file.

    Args:
        text: the result of `svg`.
        zoom: the number of pixels per unit of length.

    Raises:
        GraftError: GC061 if resvg is missing, or no font is installed.
    """
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise GraftError("GC061", "PNG files need the package resvg-py", hint="pip install 'graftc[view]'") from None
    if not _has_fonts():
        raise GraftError("GC061", "PNG files need a font", hint="install one (apt-get install fonts-dejavu)")
    width, height = _size(text)
    zoom = min(zoom, (LARGEST / max(1.0, width * height)) ** 0.5)
    return bytes(resvg_py.svg_to_bytes(svg_string=text, zoom=zoom))


@cache
def _has_fonts() -> bool:
    """Return whether a letter is drawn at all: resvg omits text for which it has no font."""
    import resvg_py

    words = f"<text y='9' font-family=\"{FONTS}\">M</text>"
    empty, written = (
        bytes(resvg_py.svg_to_bytes(svg_string=f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 9 9'>{x}</svg>"))
        for x in ("", words)
    )
    return empty != written


def _size(text: str) -> tuple[float, float]:
    """Return the width and height of an SVG file."""
    from xml.etree import ElementTree

    box = ElementTree.fromstring(text).attrib["viewBox"].split()
    return float(box[2]), float(box[3])
