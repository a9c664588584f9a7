"""A console of which nothing that is printed can steer the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from graftc.specs.errors.text import printable

__all__ = ["PlainConsole"]


class PlainConsole(Console):
    """A console that takes text as it is: brackets are not markup, and what would steer the terminal is written out.

    Colours of its own are in the styles of segments, not in their text, and stay.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Text without markup, emoji codes or highlighting."""
        kept = {name: options[name] for name in ("style", "justify", "overflow") if options.get(name)}
        return Text(printable(text), **kept)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As Rich's; the one way by which text gets to the terminal."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
