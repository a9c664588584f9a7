"""docs/images/pipeline.svg: the path from a spec and a model to a deployed one.

Text is in filled boxes or in mid grey, so that it is readable on light and on dark pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import pairwise

__all__ = ["render_picture"]

_VIEW = "0 20 800 426"
_STEP, _DATA, _PRODUCT, _GREY = "#3f58ad", "#1d6f66", "#7a4593", "#7d8797"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


@dataclass(frozen=True)
class _Box:
    """A filled box with a title and lines below it."""

    x: int
    y: int
    width: int
    height: int
    colour: str
    title: str
    lines: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[int, int]:
        return self.x, self.y + self.height // 2

    @property
    def right(self) -> tuple[int, int]:
        return self.x + self.width, self.y + self.height // 2

    def svg(self) -> str:
        middle = self.x + self.width // 2
        top = self.y + self.height // 2 + 5 - 8 * len(self.lines)
        texts = [_text(middle, top, self.title, "#ffffff", size=14, weight=600)]
        texts += [_text(middle, top + 17 + 15 * n, line, "#ffffff", size=12) for n, line in enumerate(self.lines)]
        size = f'x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}"'
        area = f'<rect {size} rx="6" fill="{self.colour}"/>'
        return "\n".join([area, *texts])


def _text(x: int, y: int, text: str, colour: str, *, size: int, weight: int = 400, anchor: str = "middle") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{colour}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'


def _arrow(*points: tuple[int, int], dashed: bool = False) -> str:
    path = " ".join(f"{'L' if n else 'M'}{x} {y}" for n, (x, y) in enumerate(points))
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{_GREY}" stroke-width="1.6" marker-end="url(#tip)"{dashes}/>'


def _band(y: int, height: int, title: str, note: str, at: int = 0) -> str:
    size = f'x="158" y="{y}" width="632" height="{height}"'
    frame = f'<rect {size} rx="9" fill="none" stroke="{_GREY}" stroke-width="1.2"/>'
    left = _text(172, y + 21, title, _GREY, size=13, weight=600, anchor="start")
    right = _text(at or 776, y + 21, note, _GREY, size=12, anchor="start" if at else "end")
    return "\n".join([frame, left, right])


def _row(y: int, height: int, colours: tuple[str, ...], boxes: tuple[tuple[str, ...], ...]) -> list[_Box]:
    gap = 16
    width = (604 - gap * (len(boxes) - 1)) // len(boxes)
    return [
        _Box(172 + n * (width + gap), y, width, height, colour, title, tuple(lines))
        for n, (colour, (title, *lines)) in enumerate(zip(colours, boxes, strict=True))
    ]


def render_picture() -> str:
    """Return the text of the picture."""
    spec = _Box(10, 42, 116, 50, _DATA, "spec", ("YAML or Python",))
    model = _Box(10, 104, 116, 50, _DATA, "model", ("nn.Module",))
    steps = _row(
        58,
        78,
        (_STEP,) * 5,
        (
            ("capture", "torch.export,", "cached"),
            ("canonicalise", "functional,", "no devices"),
            ("roles, sites", "from the", "data flow"),
            ("resolve", "targets,", "conflicts"),
            ("insert", "nodes and", "tensors"),
        ),
    )
    stored = _row(
        206,
        72,
        (_DATA, _DATA),
        (
            ("Programs", "graphs by entry, mode and signature;", "they own no tensors"),
            ("Store", "base tensors, never written,", "and adapter tensors beside them"),
        ),
    )
    ends = _row(
        346,
        78,
        (_PRODUCT, _STEP, _STEP, _PRODUCT, _PRODUCT),
        (
            ("Compiled", "trains like", "the model"),
            ("fold", "(W, b) to", "(W', b')"),
            ("certify", "probes, outputs,", "structure"),
            ("Merged", "the base's", "own graph"),
            ("deployed", "transformers,", "ONNX, .pt2"),
        ),
    )
    shapes = [
        _band(30, 120, "compiler, passes", "the verifier runs after every step"),
        _band(178, 114, "Compilation", "many graphs over one tree of tensors", at=345),
        _band(318, 120, "runtime", "over budget, nothing is written"),
        *(box.svg() for box in [spec, model, *steps, *stored, *ends]),
        *(_arrow(a.right, (b.x - 2, b.left[1])) for row in (steps, ends) for a, b in pairwise(row)),
        _arrow((126, 67), (142, 67), (142, 97), (170, 97)),
        _arrow((126, 129), (142, 129), (142, 97), (170, 97)),
        _arrow((722, 136), (722, 204)),
        _arrow((722, 164), (319, 164), (319, 204)),
        _arrow((254, 278), (254, 344)),
        _arrow((68, 154), (68, 306), (700, 306), (700, 280), dashed=True),
        _text(12, 323, "shares its storage", _GREY, size=12, anchor="start"),
    ]
    size = 'viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
    tip = f'<marker id="tip" {size} orient="auto"><path d="M0 0L8 4L0 8z" fill="{_GREY}"/></marker>'
    title = "From a spec and a model to Programs over one Store, to a compiled model, and to a merged and deployed one"
    return "\n".join(
        [
            "<!-- Made by `make docs` (python -m tools.docs); do not edit. -->",
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{_VIEW}" role="img" font-family="{_FONT}">',
            f"<title>{escape(title)}</title>",
            f"<defs>{tip}</defs>",
            *shapes,
            "</svg>\n",
        ]
    )
