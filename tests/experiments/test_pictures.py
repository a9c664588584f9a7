"""Pictures are the same bytes from the same cells, and only of what there are cells for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.claims_plan import FEW, LOW_DATA, few
from experiments.pictures import DRAWN, THEMES, _axes, draw, over_parameters, shown
from experiments.placing import spread
from experiments.store import FOLDER
from experiments.training_plans import ALONE, ROWS, encoder_settings
from tests.experiments.test_claims import keep


def test_without_cells_there_is_no_picture(tmp_path: Path) -> None:
    assert draw(tmp_path / "cells", tmp_path / "drawn") == [] and not (tmp_path / "drawn").exists()
    assert [*shown("rates", tmp_path / "drawn")] == []


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.01, 2)), max_size=12))
def test_nothing_overlaps(wanted: list[tuple[float, float]]) -> None:
    """In the order that is wanted; where there is room, nothing is moved."""
    centres = sorted(centre for centre, _ in wanted)
    widths = [width for _, width in wanted]
    places = spread(centres, widths)
    pairs = list(zip(range(len(places) - 1), range(1, len(places)), strict=True))
    room = [(widths[a] + widths[b]) / 2 for a, b in pairs]
    assert all(places[b] - places[a] >= own - 1e-9 for (a, b), own in zip(pairs, room, strict=True))
    if all(centres[b] - centres[a] > own + 1e-9 for (a, b), own in zip(pairs, room, strict=True)):
        assert places == pytest.approx(centres)


def test_a_group_keeps_its_place() -> None:
    assert spread([1.0, 1.0, 5.0], [1.0, 1.0, 1.0]) == pytest.approx([0.5, 1.5, 5.0])


@pytest.mark.slow
def test_no_label_covers_another() -> None:
    """In the picture of the stored cells; nor do they reach into the data."""
    with _axes(THEMES["light"]) as (figure, axes):
        over_parameters(axes, THEMES["light"], FOLDER)
        figure.canvas.draw()
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) > 10
        assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
        assert not any(axes.bbox.shrunk(0.99, 0.99).overlaps(box) for box in boxes)


@pytest.mark.full
def test_pictures_show_every_row(tmp_path: Path) -> None:
    """In both themes, with the same bytes again; the page shows each in the theme it is for."""
    for number, name in enumerate((ALONE, "LoRA", "full")):
        keep(tmp_path, encoder_settings()[0], ROWS[name], [0.5 + 0.02 * number + 0.001 * seed for seed in range(5)])
    for size in FEW:
        for row in LOW_DATA:
            keep(tmp_path, few(size), row, [0.4, 0.41, 0.42])
    drawn = [draw(tmp_path, tmp_path / name) for name in ("one", "two")]
    assert len(drawn[0]) == len(DRAWN) * len(THEMES)
    for first, second in zip(*drawn, strict=True):
        assert first.read_bytes() == second.read_bytes()
    text = {path.stem: path.read_text(encoding="utf-8") for path in drawn[0]}
    assert all(name in text["parameters-light"] for name in ("LoRA", "full", ALONE))
    assert all(THEMES[theme].text in text[f"rates-{theme}"] for theme in THEMES)
    assert "prefix" in text["little-data-dark"] and not re.search(r"<image", "".join(text.values()))
    assert all(f"<title>{DRAWN[path.stem.rpartition('-')[0]].title}</title>" in text[path.stem] for path in drawn[0])
    lines = "\n".join(shown("rates", tmp_path / "one"))
    assert DRAWN["rates"].caption in lines
    assert "rates-dark.svg#gh-dark-mode-only" in lines and "python -m experiments pictures" in lines
