"""Text for the cells of tables."""

from __future__ import annotations


def cell(text: str) -> str:
    """Escape text so that it is safe in a cell of a table and shows unchanged."""
    return "".join(f"\\{c}" if c in "|<>*_`[]" else c for c in text)


def percent(part: int, whole: int) -> str:
    """Format a share with one digit; ``none`` if the whole is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "none"
