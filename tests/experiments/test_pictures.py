"""Pictures are the same bytes from the same cells, and only of what there are cells for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.claims_plan import FEW, LOW_DATA, few
from experiments.pictures import DRAWN, THEMES, draw, shown
from experiments.training_plans import ALONE, ROWS, encoder_settings
from tests.experiments.test_claims import keep


def test_without_cells_there_is_no_picture(tmp_path: Path) -> None:
    assert draw(tmp_path / "cells", tmp_path / "drawn") == [] and not (tmp_path / "drawn").exists()
    assert [*shown("rates", tmp_path / "drawn")] == []


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
    lines = "\n".join(shown("rates", tmp_path / "one"))
    assert "rates-dark.svg#gh-dark-mode-only" in lines and "python -m experiments pictures" in lines
