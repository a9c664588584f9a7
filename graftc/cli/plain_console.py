"""A console whose text cannot control the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from graftc.specs.errors.text import printable


class PlainConsole(Console):
    """Console that prints text literally: brackets are not markup, and control characters are escaped.

    The console's own colours are not affected, because they are stored in the styles of segments, not in their text.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text without markup, emoji codes or highlighting."""
        kept = {name: options[name] for name in ("style", "justify", "overflow") if options.get(name)}
        return Text(printable(text), **kept)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as Rich does, with the text of every segment escaped; all text reaches the terminal this way."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
