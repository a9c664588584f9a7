"""Pictures rendered without a browser, and the files that a view writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from graftc.runtime.view import pictures
from graftc.runtime.view.pictures import LARGEST
from graftc.specs.errors.diagnostics import GraftError
from tests.cli.support import run_here
from tests.kit.models import fresh

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}]}


@pytest.fixture(scope="module")
def llama() -> Any:
    return fresh("llama", **SPEC)


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


@pytest.mark.slow
def test_a_picture_shows_what_was_inserted(llama: Any) -> None:
    view = llama.view()
    before, after, both = (" ".join(texts(view.svg(shown=shown))) for shown in ("before", "after", "diff"))
    assert "q_proj" in before or "attn" in before
    assert "lora" in after and "lora" in both and "lora" not in before
    assert view.svg() == view.svg()
    inner = " ".join(texts(view.svg(opened=["model.layers.0", "model.layers.0.self_attn"])))
    assert "scaled_dot_product" in inner.replace("…", "") or "attention" in inner


@pytest.mark.full
def test_a_png_is_the_picture(llama: Any) -> None:
    png = llama.view().png()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width > 100 and height > 100 and width * height <= LARGEST * 1.1
    without = re.sub(r"<text.*?</text>", "", llama.view().svg(), flags=re.DOTALL)
    assert pictures.png(without) != png  # the picture contains the text


@pytest.mark.slow
def test_no_fonts_are_said(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_has_fonts", lambda: False)
    with pytest.raises(GraftError, match="GC061: PNG files need a font"):
        llama.view().png()


@pytest.mark.full
def test_files_are_whole_or_not_there(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = llama.view()
    for name in ("a.html", "a.svg", "a.png"):
        assert view.save(tmp_path / name).stat().st_size > 1000
        with pytest.raises(GraftError, match="GC063"):
            view.save(tmp_path / name)
        view.save(tmp_path / name, force=True)
    with pytest.raises(GraftError, match="GC091"):
        view.save(tmp_path / "a.pdf")
    monkeypatch.setitem(__import__("sys").modules, "quickjs", None)
    with pytest.raises(GraftError, match=r"GC061(.|\n)*graftc\[view\]"):
        llama.view().save(tmp_path / "b.svg")
    assert not (tmp_path / "b.svg").exists()


@pytest.mark.full
def test_the_command_writes_them(llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = llama.save(tmp_path / "artifact", certify=False)
    files = {kind: tmp_path / f"x.{kind}" for kind in ("html", "svg", "png", "dot", "graphml")}
    options = [text for kind, path in files.items() for text in (f"--{kind}", str(path))]
    outcome = run_here(capsys, "inspect", str(folder), *options)
    assert outcome.status == 0, outcome.err
    assert all(path.stat().st_size > 500 for path in files.values())
    again = run_here(capsys, "inspect", str(folder), *options)
    assert again.status != 0 and "GC063" in again.err
    inside = run_here(capsys, "inspect", str(folder), "--html", str(folder / "x.html"))
    assert inside.status != 0 and not (folder / "x.html").exists()
