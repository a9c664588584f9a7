"""HTML for notebooks: it contains what values say, whatever the names of models and specs."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graftc
from graftc.records.certificate import Certificate, SiteEvidence
from graftc.records.report import AdaptationReport, Report
from graftc.records.retention import Retention
from graftc.records.tree import TreeNode, TreeTensor
from graftc.specs.errors.markup import Html, bullets, escaped, folded, joined, table, tag
from graftc.testing.families import tiny

ELEMENTS = {
    "b",
    "bdi",
    "br",
    "code",
    "details",
    "div",
    "li",
    "summary",
    "table",
    "tbody",
    "td",
    "th",
    "thead",
    "tr",
    "ul",
}
ATTRIBUTES = {
    ("style", "text-align: left; vertical-align: top"),
    ("style", "text-align: right; vertical-align: top"),
    ("style", "margin-left: 1.2em"),
    ("open", None),
}
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</td></table></details>&lt;b&gt;",
    "{{constructor}} $(x) `y` \\(z\\)",
    "x" * 10_000,
    "\u202egnp.exe\u2066",
    "\u05d0\u05d1 \u0627\u0628",
    "a\x00\x1b[31m\x07b\r\nc\td",
    "'; drop table layers; --",
    "<!-- comment --> <![CDATA[ ]]> <?php ?>",
]


class Page(HTMLParser):
    """A parser that collects the contents of some HTML; elements have to be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Allow only elements and attributes that the code itself writes."""
        assert tag in ELEMENTS and set(attrs) <= ATTRIBUTES | {("open", "")}, (tag, attrs)
        self.elements[tag] += 1
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Check that it closes the element that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        """Fail, because comments are never written."""
        raise AssertionError(data)

    def handle_decl(self, decl: str) -> None:
        """Fail, because declarations are never written."""
        raise AssertionError(decl)

    def handle_pi(self, data: str) -> None:
        """Fail, because processing instructions are never written."""
        raise AssertionError(data)

    def unknown_decl(self, data: str) -> None:
        """Fail, because unknown declarations are never written."""
        raise AssertionError(data)

    @property
    def text(self) -> str:
        """All text, joined."""
        return "".join(self.words)


def page(value: Any) -> Page:
    """Parse the HTML of a value; it must have no colours and no control characters."""
    text = value._repr_html_()
    assert "color" not in text and "background" not in text
    parsed = Page(text)
    assert not any(char in parsed.text for char in "\x00\x1b\x07\u202e\u2066")
    return parsed


def unmarked(page: Page) -> dict[str, int]:
    """Count the elements, except those around text that may run from right to left."""
    return {name: count for name, count in page.elements.items() if name != "bdi"}


@pytest.mark.slow
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.text())
@settings(deadline=None)
def test_any_text_is_text(words: list[str], summary: str) -> None:
    rows = table(words, [words, words], numbers=words[:1])
    parsed = Page(folded(joined([tag("b", summary), *words], " & "), Html(rows + bullets(words))))
    assert parsed.elements["td"] == 2 * len(words) and parsed.elements["li"] == len(words)
    assert parsed.elements["b"] == 1 and parsed.elements["details"] == 1
    shown = [word for word in words if word.isalnum() and word.isascii()]
    assert all(parsed.text.count(word) >= 5 for word in shown)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_text(name: str) -> None:
    report = Report((AdaptationReport(1, 2, 3, 4, 5.0, name, name),), 9, 2, 1, 2, 0.1, 1.0, 0.0, 0.0, False, (name,))
    evidence = SiteEvidence(name, (name, name), 1.0, 1.0, 0.0, Retention())
    certificate = Certificate((evidence,), {name: 3.0}, 0.1, name, "other", (name,), notes=(name,))
    tensors = [TreeTensor(each, "f32", (2, 3), False, True, each) for each in (name, "x")]
    tree = TreeNode(name, ("a", "b"), (name,), 6, 2, (tensors[0],), (), ())
    plain = page(TreeNode("n", ("a", "b"), ("x",), 6, 2, (tensors[1],), (), ()))
    for value in (report, certificate, tree, Html(table((name,), [(name,)])), Html(folded(name, name, shown=True))):
        parsed = page(value)
        assert len(parsed.text) < 5_000
        if name.isascii() and name.isprintable() and len(name) < 100:
            assert name in parsed.text
    assert unmarked(page(tree)) == unmarked(plain)


def test_long_names_keep_their_ends() -> None:
    shortened = escaped("first" + "x" * 10_000 + "last")
    assert shortened.startswith("first") and shortened.endswith("last") and len(shortened) == 120


def test_many_rows_are_folded() -> None:
    parsed = Page(table(("n",), [(n,) for n in range(1_000)]))
    assert parsed.elements["td"] == 1_000 and parsed.elements["details"] == 4 and "and 800 more" in parsed.text
    assert not table(("n",), []) and not bullets([])


class Odd(nn.Module):
    """Layers with unlikely names."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 6))
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply all of them, one after the other."""
        for name in self.names:
            x = torch.relu(self.get_submodule(name)(x))
        return x


@pytest.mark.slow
def test_models_with_hostile_names() -> None:
    """From capturing on, nothing shown of such a model contains an element of its own."""
    names = [name.replace(".", "_") for name in HOSTILE if "\x00" not in name]
    model, inputs = Odd(names), (torch.ones(4, 6),)
    selection = graftc.select(model, inputs)
    assert len(selection) == len(names)
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**"}}]}, model, inputs)
    plain = graftc.select(Odd([f"n{i}" for i in range(len(names))]), inputs)
    shown = page(selection)
    assert unmarked(shown) == unmarked(page(plain))
    assert shown.elements["td"] == page(plain).elements["td"] and "alert(1)" in shown.text
    for value in (compiled, compiled.spec, compiled.report, compiled.tree(), selection.modules("nothing<b>")):
        page(value)
    lines = repr(selection).splitlines()
    assert len(lines) == 2 + len(names) and max(map(len, lines)) < 700 and "\x1b" not in repr(selection)


@pytest.mark.slow
def test_a_compiled_model_shows_its_adaptations_and_modules() -> None:
    model = tiny("llama")
    spec = {
        "adapt": [{"method": "lora", "rank": 2, "target": graftc.select(model).role("attn.q")}, {"method": "prefix"}],
        "train": ["lm_head"],
    }
    spec["adapt"][1]["length"] = 3  # type: ignore[index]
    compiled = graftc.compile(spec, model)
    shown = page(compiled)
    for word in ("LlamaForCausalLM", "lora", "prefix", "trained", "attn.q", "2 layers alike", "q_proj"):
        assert word in shown.text, word
    assert shown.elements["details"] > 5 and shown.elements["tr"] == 4
    written = page(compiled.spec)
    for word in ("lora", "rank: 2", "attn.q", "expect: 2", "prefix", "lm_head"):
        assert word in written.text, word
    assert f"{compiled.report.trainable_parameters:,}" in page(compiled.report).text
    assert repr(compiled).startswith("LlamaForCausalLM(")


@pytest.mark.slow
def test_a_certificate_says_why_it_did_not_pass() -> None:
    model = tiny("llama")
    compiled = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}, model)
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    certificate = compiled.merge().certificate
    assert "passed" in page(certificate).text and "q_proj" in page(certificate).text
    failed = Certificate(certificate.sites, {"logits": 3.0}, 0.1, "a", "b")
    shown = page(failed)
    assert "not passed" in shown.text and all(reason in shown.text for reason in failed.failures())


@pytest.mark.parametrize(
    ("sites", "algebra", "structure", "words"),
    [
        (
            1,
            1e-15,
            "g",
            "certificate passed: 1 site within 1.0e-15 in float64, outputs within 1.0e-04 (budget 1.0e-03)",
        ),
        (2, 1e-15, "g", "certificate passed: 2 sites within 1.0e-15 in float64"),
        (1200, 1e-15, "g", "certificate passed: 1,200 sites"),
        (2, 1e-3, "g", "certificate NOT PASSED: 2 sites within 1.0e-03 in float64"),
        (2, 1e-15, "other", "certificate NOT PASSED: 2 sites"),
    ],
)
def test_a_printed_certificate_is_short(sites: int, algebra: float, structure: str, words: str) -> None:
    evidence = [SiteEvidence(f"layer.{n}", ("lora",), 0.1, algebra, 0.5, Retention()) for n in range(sites)]
    certificate = Certificate(tuple(evidence), {"logits": 1e-4}, 1e-3, structure=structure, base_structure="g")
    first, *others = str(certificate).split("\n")
    assert first.startswith(words)
    assert first.endswith("not the base's graph" if structure == "other" else ", the base's graph")
    assert others == [f"  {failure}" for failure in certificate.failures()]


def test_a_printed_certificate_without_outputs() -> None:
    evidence = (SiteEvidence("layer", ("lora",), 0.1, 1e-15, 0.5, Retention()),)
    words = (
        "certificate passed: 1 site within 1.0e-15 in float64, every entry rounded to nearest; no outputs were compared"
    )
    assert str(Certificate(evidence, {}, 0.0, structure="g", base_structure="g")) == words
