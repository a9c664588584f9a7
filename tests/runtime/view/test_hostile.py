"""Names that are meant to break what shows them: in pages, pictures and notebooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import graftc
from graftc.runtime.view.contents import Evidence, contents
from graftc.runtime.view.page import SCRIPTS, asset, page
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny

NAMES = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "\"'><svg onload=alert(3)>",
    "{{script}}{{data}}${alert(4)}",
    "\u202egnp-exe\u202c",
    "\x1b[31mred\x07\x00",
    "]]>&lt;&amp;<!--",
    "constructor",
    "toString",
    "long" * 2500,
    "שלום",
]


class Named(nn.Module):
    """A model with one linear map for each name."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x) + 1
        return x


@pytest.fixture(scope="module")
def view() -> Any:
    torch.manual_seed(0)
    spec = {"adapt": [{"method": "lora", "rank": 2, "name": "a", "target": {"modules": "*"}}]}
    return graftc.compile(spec, Named(), {"x": torch.randn(3, 4)}).view(certify=True)


@pytest.mark.full
def test_no_name_becomes_an_element(view: Any, tmp_path: Path, opened: Callable[..., Any]) -> None:
    file = view.save(tmp_path / "page.html")
    page = opened(file)
    for tab in ("report", "timeline", "spec", "graph"):
        page.evaluate(f"location.hash = '#tab={tab}&view=diff'")
        page.wait_for_function(f"graftcPage.state().tab === '{tab}'")
    for name in NAMES:
        page.evaluate("name => graftcPage.select(name)", name)
    page.evaluate("graftcPage.open('')")
    page.locator("#search").fill("alert")
    assert page.locator("img, script:not([type]) + script, svg[onload]").count() == 0
    assert page.evaluate(
        "[...document.querySelectorAll('*')].every(e => !e.getAttributeNames().some(a => /^on/.test(a)))"
    )
    text = page.locator("body").inner_text()
    assert "\u202e" not in text and "\x1b" not in text


@pytest.mark.full
def test_no_text_of_a_file_becomes_an_element(tmp_path: Path, opened: Callable[..., Any]) -> None:
    """Reasons, evidence, certificates, logs, differences and titles come from untrusted files."""
    bad = "".join(NAMES[:6])
    compiled: Any = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "name": "a", "target": {"role": ["attn.q"]}}]}, tiny("bert")
    )
    snapshot = compiled.snapshot
    sites = tuple(replace(site, evidence=bad, roles=(*site.roles, bad), stack=bad) for site in snapshot.sites)
    number = {"change": 1.0, "algebra": 1e-12, "rounding": 0.5, "retention": None}
    certificate = {
        **{"passed": False, "outputs": {bad: 1.0}, "budget": 0.5, "failures": [bad], "bounds": {}},
        "sites": [{"site": bad, "adaptations": [bad], **number}],
    }
    evidence = Evidence(
        certificate=certificate,
        kept={"a": bad},
        curves=[{"name": bad, "group": f"{bad}: {bad}", "steps": [1, 2], "values": [1.0, 2.0]}],
        figures={("a", str(sites[0].key)): {bad: 1.0}},
        warnings=[{"code": bad, "text": bad}],
        artifact=bad,
        title=bad,
        differences=[{"what": bad, "lines": [bad]}],
    )
    file = tmp_path / "page.html"
    file.write_text(page(contents(replace(snapshot, model=bad, sites=sites), evidence)), encoding="utf-8")
    shown = opened(file)
    for tab in ("report", "timeline", "spec", "graph"):
        shown.evaluate(f"location.hash = '#tab={tab}'")
        shown.wait_for_function(f"() => graftcPage.state().tab === '{tab}'")
        assert shown.locator("img, svg[onload], script:not([type]) + script").count() == 0
    shown.evaluate("graftcPage.select('a')")
    shown.evaluate("name => graftcPage.select(name)", sites[0].key.module)
    assert shown.locator("img").count() == 0
    assert "\x1b" not in shown.locator("body").inner_text() and "\u202e" not in shown.locator("body").inner_text()


@pytest.mark.full
def test_pictures_hold_names_as_text(view: Any) -> None:
    for shown in ("after", "before", "diff"):
        text = view.svg(shown=shown)
        root = ElementTree.fromstring(text)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert not tags & {"script", "img", "image", "foreignObject", "a"}
        assert "alert(1)" in text and "\u202e" not in text and "\x1b" not in text
    assert view.png().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.sample("\\u202egnp", "\\x1b[31m")
@pytest.mark.parametrize("name", ["\u202egnp", "a\nb", "\x1b[31m", "long" * 2500])
def test_what_cannot_be_stored_is_said_before_anything_is_written(name: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(4, 4))
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "*"}}]}
    compiled = graftc.compile(spec, model, {"input": torch.randn(3, 4)})
    with pytest.raises(GraftError, match="GC064: an artifact cannot contain a tensor named"):
        compiled.save(tmp_path / "artifact", certify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_notebook_gets_one_frame(view: Any) -> None:
    from html.parser import HTMLParser

    class Elements(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple[str, dict[str, str | None]]] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found.append((tag, dict(attrs)))

    parser = Elements()
    parser.feed(view._repr_html_())
    ((tag, attributes),) = parser.found
    assert tag == "iframe" and attributes["srcdoc"] == view.html
    assert "allow-same-origin" not in (attributes["sandbox"] or "")


def test_the_policy_lets_only_our_code_run(view: Any) -> None:
    head = view.html.partition("</head>")[0]
    policy = head.partition('http-equiv="Content-Security-Policy" content="')[2].partition('"')[0]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "http" not in policy
    for name in SCRIPTS:
        code = asset(name)
        assert "innerHTML" not in code and "eval(" not in code and "document.write" not in code, name
