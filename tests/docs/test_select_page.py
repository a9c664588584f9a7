"""``docs/select.md`` shows what its code prints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tools.docs.blocks import blocks

PAGE = "select.md"


@pytest.mark.slow
def test_the_page_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"__name__": PAGE}
    every = blocks(PAGE)
    pairs = [(a, b) for a, b in pairwise(every) if a.mark == "run"]
    assert len(pairs) == sum(block.language == "text" for block in every) > 3
    for code, shown in pairs:
        capsys.readouterr()
        exec(compile(code.text, str(code), "exec"), scope)
        assert shown.language == "text" and capsys.readouterr().out == shown.text, str(shown)
