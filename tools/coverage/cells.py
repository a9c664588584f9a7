"""Text for the cells of tables."""

from __future__ import annotations


def cell(text: str) -> str:
    """Text that is safe in a table's cell and shows as it is."""
    return "".join(f"\\{c}" if c in "|<>*_`[]" else c for c in text)


def percent(part: int, whole: int) -> str:
    """A share with one digit; ``none`` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "none"
