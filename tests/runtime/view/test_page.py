"""The page in a real browser: opened from disk, used as people do, compared with the command line's numbers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.cli import main
from graftc.runtime.artifact import open_artifact
from graftc.testing.families import HIDDEN, tiny
from tests.cli.support import run_here
from tests.kit.places import EXAMPLES
from tests.kit.plugins import installing

PLUGIN = EXAMPLES / "plugin_pass"
SPEC: dict[str, Any] = {
    "adapt": [
        {"method": "lora", "name": "low", "rank": 2, "dropout": 0.1, "target": {"role": ["attn.q", "attn.v"]}},
        {"method": "prefix", "name": "virtual", "length": 3},
    ]
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a certificate; its second adaptation does not fold."""
    place = tmp_path_factory.mktemp("page") / "artifact"
    return graftc.compile(SPEC, tiny("bert")).save(place)


@pytest.fixture(scope="module")
def file(artifact: Path) -> Path:
    """The artifact's page."""
    target = artifact.parent / "page.html"
    written(target, "inspect", str(artifact), "--html", str(target))
    return target


def written(target: Path, *command: str) -> None:
    assert main(command) in (0, 1)  # a diff that finds something exits with 1
    assert target.exists()


def state(page: Any) -> dict[str, Any]:
    values: dict[str, Any] = page.evaluate("graftcPage.state()")
    return values


def says(page: Any, text: str) -> None:
    """Wait until the details contain a text."""
    page.wait_for_function("text => document.querySelector('#right').innerText.includes(text)", arg=text, timeout=5000)


def marks(page: Any) -> list[dict[str, Any]]:
    """Return the boxes that are drawn."""
    boxes: list[dict[str, Any]] = page.evaluate("graftcPage.scene()")["boxes"]
    return boxes


@pytest.mark.full
def test_it_opens_from_disk_and_asks_for_nothing(file: Path, opened: Callable[..., Any]) -> None:
    page = opened(file)
    assert page.title() == "BertForSequenceClassification, adapted"
    assert state(page)["tab"] == "graph"
    assert len(marks(page)) > 3
    assert file.stat().st_size < 400_000


@pytest.mark.slow
def test_every_figure_is_the_one_of_the_data_and_of_the_command(
    file: Path, artifact: Path, opened: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    page = opened(file, "#tab=report")
    data = page.evaluate("graftcPage.data")
    figures = page.eval_on_selector_all(
        "[data-figure]", "all => all.map(e => [e.dataset.figure, e.dataset.value, e.tagName, e.textContent])"
    )
    assert len(figures) > 25
    for path, exact, tag, text in figures:
        figure: Any = data
        for part in path.split("."):
            figure = figure[int(part)] if isinstance(figure, list) else figure[part]
        if not isinstance(figure, int | float) or isinstance(figure, bool):
            continue
        assert float(exact) == figure, path
        if isinstance(figure, int) and tag == "TD":  # above the tabs they are rounded
            assert text.replace(",", "") == str(figure), path
    outcome = run_here(capsys, "inspect", str(artifact), "--json")
    summary = outcome.data["summary"]
    assert data["summary"] == summary
    for ours, theirs in zip(data["adaptations"], summary["adaptations"], strict=True):
        assert ours == {**ours, **{key: value for key, value in theirs.items() if key != "tensors"}}


@pytest.mark.full
def test_groups_open_and_close(file: Path, opened: Callable[..., Any]) -> None:
    page = opened(file)
    page.evaluate("graftcPage.open('bert.encoder.layer.0')")
    page.evaluate("graftcPage.select('bert.encoder.layer.0')")
    opened_now = len(marks(page))
    page.locator("#canvas").focus()
    page.keyboard.press("-")
    page.wait_for_function(f"() => graftcPage.scene().boxes.length < {opened_now}")
    page.keyboard.press("+")
    page.wait_for_function(f"() => graftcPage.scene().boxes.length === {opened_now}")


@pytest.mark.full
def test_levels_of_detail(file: Path, opened: Callable[..., Any]) -> None:
    page = opened(file)
    shown = {}
    for level in ("top", "layers", "nodes"):
        page.locator("[data-id=level]").select_option(level)
        page.wait_for_timeout(300)
        shown[level] = {box["key"] for box in marks(page)}
    assert shown["top"] <= shown["layers"] < shown["nodes"]
    assert {"bert.encoder.layer.0", "bert.encoder.layer.1"} <= shown["layers"]


@pytest.mark.slow
def test_views_by_key_mark_what_differs(file: Path, opened: Callable[..., Any]) -> None:
    page = opened(file)
    page.locator("#canvas").focus()
    for key, view in (("2", "before"), ("3", "diff"), ("1", "after")):
        page.keyboard.press(key)
        page.wait_for_function(f"() => graftcPage.state().view === '{view}'")
    assert "view=" not in page.url
    page.keyboard.press("3")
    page.wait_for_function("() => graftcPage.state().view === 'diff'")
    assert "view=diff" in page.url


@pytest.mark.full
def test_what_is_open_stays_open_in_other_views(file: Path, opened: Callable[..., Any]) -> None:
    """Layers stay open even in the base's own graph, where they are alike."""
    page = opened(file, "#view=diff")
    page.evaluate("graftcPage.open('bert.encoder.layer.1.attention.self')")
    for view in ("before", "after", "diff"):
        page.locator("#canvas").focus()
        page.keyboard.press({"after": "1", "before": "2", "diff": "3"}[view])
        page.wait_for_function(f"() => graftcPage.state().view === '{view}'")
        page.wait_for_timeout(300)
        assert "bert.encoder.layer.1.attention.self" in {box["key"] for box in marks(page)}, view


@pytest.mark.slow
def test_the_tree_is_worked_by_keys(file: Path, opened: Callable[..., Any]) -> None:
    page = opened(file)
    rows = page.locator("#left [role=treeitem]")
    before = rows.count()
    first = page.locator("#left [role=treeitem][tabindex='0']")
    first.focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"() => document.querySelectorAll('#left [role=treeitem]').length < {before}")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"() => document.querySelectorAll('#left [role=treeitem]').length === {before}")
    page.keyboard.press("Enter")
    assert state(page)["sel"]


@pytest.mark.slow
def test_search_finds_and_selects(file: Path, opened: Callable[..., Any]) -> None:
    page = opened(file)
    page.locator("#canvas").focus()
    page.keyboard.press("/")
    page.keyboard.type("layer.1.attention.self.query")
    page.wait_for_selector("#found [role=option]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    says(page, "query")
    page.locator("#search").fill("nothing is called so")
    page.wait_for_function("() => /nothing/i.test(document.querySelector('#found').textContent)")


@pytest.mark.slow
def test_the_timeline_shows_every_step(
    file: Path, artifact: Path, opened: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    page = opened(file, "#tab=timeline&frame=0")
    outcome = run_here(capsys, "inspect", str(artifact), "--history", "--json")
    steps = outcome.data["history"]
    page.wait_for_selector("ol.steps li.step")
    rows = page.locator("ol.steps li.step")
    assert rows.count() == len(steps)
    for number, step in enumerate(steps):
        assert step["step"] in rows.nth(number).locator("button").inner_text()
        shown = rows.nth(number).locator(".counts span").all_inner_texts()
        assert [int(re.sub(r"\D", "", text) or 0) for text in (*shown[:2], shown[3])] == [
            step["added"],
            step["removed"],
            step["nodes"],
        ]
    page.locator("#canvas").focus()
    page.keyboard.press("End")
    page.wait_for_function(f"() => graftcPage.state().frame === {len(steps) - 1}")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(f"() => graftcPage.state().frame === {len(steps) - 2}")
    insertion = next(n for n, step in enumerate(steps) if step["step"] == "insert(virtual)")
    page.evaluate(f"graftcPage.frame({insertion})")
    page.wait_for_function(f"() => graftcPage.state().frame === {insertion}")
    says(page, "insert(virtual)")


@pytest.mark.full
def test_an_address_leads_back_to_what_was_seen(file: Path, opened: Callable[..., Any]) -> None:
    page = opened(file, "#view=diff&mode=train")
    page.evaluate("graftcPage.select('bert.encoder.layer.0.attention.self')")
    seen, address = state(page), page.url
    again = opened(file, "#" + address.partition("#")[2])
    assert {**state(again), "camera": None} == {**seen, "camera": None}
    page.evaluate("location.hash = '#tab=report'")
    page.wait_for_function("() => graftcPage.state().tab === 'report'")
    page.go_back()
    page.wait_for_function("() => graftcPage.state().tab === 'graph'")
    for broken in ("#tab=%E0%A4%A", "#sel=node:&frame=-3&open=nobody&mode=x", "#" + "a=1&" * 3000):
        assert state(opened(file, broken))["tab"] == "graph"


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (760, "light"), (760, "dark")])
def test_it_fits_and_follows_the_theme(file: Path, opened: Callable[..., Any], width: int, scheme: str) -> None:
    page = opened(file, width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.locator("#theme").select_option("light" if scheme == "dark" else "dark")
    assert page.evaluate("document.documentElement.dataset.theme") != scheme


@pytest.mark.slow
def test_three_questions_are_answered(file: Path, opened: Callable[..., Any]) -> None:
    """The page shows each layer's rank, the prefix's changes in attention, and why an adaptation cannot fold."""
    page = opened(file, "#tab=report")
    report = page.locator("#report").inner_text()
    kept = {record.name: record.reason for record in open_artifact(file.parent / "artifact").manifest.kept}
    assert kept.keys() == {"virtual"}
    assert kept["virtual"] in report
    page.evaluate("graftcPage.select('bert.encoder.layer.0.attention.self.query')")
    page.wait_for_function("() => graftcPage.state().tab === 'graph'")
    says(page, "f32[2, 48]")
    page.evaluate("location.hash = '#view=diff'")
    page.wait_for_function("() => graftcPage.state().view === 'diff'")
    graph = page.evaluate("graftcPage.data.graphs.eval")
    strings, nodes = graph["strings"], graph["nodes"]
    attention = next(
        number
        for number, target in enumerate(nodes["target"])
        if "scaled_dot_product" in strings[target] and nodes["base"][number] and nodes["gone"][number] == -1
    )
    edges = graph["edges"]
    reader = next(
        target
        for source, target, base in zip(edges["source"], edges["target"], edges["base"], strict=True)
        if source == attention and base
    )
    page.evaluate("name => graftcPage.select(name)", strings[nodes["name"][reader]])
    for text in ("Rewired", "Read before", "scaled_dot_product_attention", "Reads now", "virtual"):
        says(page, text)
    page.evaluate("graftcPage.select('virtual')")
    says(page, kept["virtual"])


@pytest.mark.full
def test_two_artifacts_side_by_side(artifact: Path, opened: Callable[..., Any]) -> None:
    other = {"adapt": [{**SPEC["adapt"][0], "rank": 4}]}
    second = graftc.compile(other, tiny("bert")).save(artifact.parent / "second", force=True)
    target = artifact.parent / "diff.html"
    written(target, "diff", str(artifact), str(second), "--html", str(target), "--force")
    page = opened(target, "#view=diff")
    graph = page.evaluate("graftcPage.data.graphs.eval")
    nodes, never = graph["nodes"], len(graph["frames"])
    removed = [born for born, base in zip(nodes["born"], nodes["base"], strict=True) if base and born >= never]
    assert removed  # the prefix of the first
    text = opened(target, "#tab=report").locator("#report").inner_text()
    assert "rank: 4" in text and "virtual" in text


@pytest.mark.slow
def test_roles_of_a_model(tmp_path: Path, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target, folder = tmp_path / "roles.html", tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    written(target, "roles", str(folder), "--html", str(target))
    page = opened(target)
    legend = page.locator("body").inner_text()
    assert "attn.q" in legend and "ffn.down" in legend
    assert not re.search(r"(?i)inserted by", legend)


@pytest.mark.slow
def test_sizes_shares_and_what_is_read_no_more(tmp_path: Path, opened: Callable[..., Any]) -> None:
    """Ranks are shown by layer, shares add up, and the attention that a prefix has replaced is unread."""
    spec = {
        "adapt": [
            {
                **{"method": "lora", "name": "low", "rank": 3, "target": {"role": ["attn.q"]}},
                "overrides": [{"layers": [1], "rank": 2}],
            },
            SPEC["adapt"][1],
        ],
        "train": ["classifier"],
    }
    page = opened(graftc.compile(spec, tiny("bert")).view().save(tmp_path / "page.html"), "#tab=report")
    data = page.evaluate("graftcPage.data")
    assert data["adaptations"][0]["size"] == "rank 3 (0), rank 2 (1)"
    ranks = {row["layer"][-1]: row["size"] for row in data["layers"] if row["adaptation"] == "low"}
    assert ranks == {"0": "rank 3", "1": "rank 2"}
    assert "rank 3 (0), rank 2 (1)" in page.locator("#report").inner_text()
    total = sum(a["trainable_parameters"] for a in data["adaptations"])
    share = 100 * total / (data["summary"]["base_parameters"] + total)
    assert sum(a["share"] for a in data["adaptations"]) == pytest.approx(share, rel=1e-12)
    graph = data["graphs"]["eval"]
    unread = [graph["strings"][t] for t, u in zip(graph["nodes"]["target"], graph["nodes"]["unread"], strict=True) if u]
    assert sorted(unread) == ["aten.scaled_dot_product_attention"] * 2 + ["classifier.bias", "classifier.weight"]
    page.evaluate("location.hash = '#view=diff'")
    page.wait_for_function("() => graftcPage.state().view === 'diff'")
    page.evaluate("graftcPage.open('bert.encoder.layer.0.attention.self')")
    page.evaluate("graftcPage.select('%scaled_dot_product_attention')")
    says(page, "removed")


@pytest.mark.full
def test_what_a_plugin_reports_is_in_the_report(tmp_path: Path, opened: Callable[..., Any]) -> None:
    source = (PLUGIN / "graftc_macs.py").read_text(encoding="utf-8")
    (tmp_path / "site").mkdir()
    with installing(tmp_path / "site") as install:
        install("graftc-macs", source, macs="COUNT")
        file = graftc.compile(SPEC, tiny("bert")).view().save(tmp_path / "page.html")
    page = opened(file, "#tab=report")
    name = "classifier.weight"
    row = page.locator("tr", has=page.locator("td", has_text=re.compile(f"^{re.escape(name)}$"))).first
    assert row.inner_text().split() == ["macs", "multiply_adds", name, str(3 * HIDDEN)]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "text", "shown"),
    [
        ("training_log.jsonl", '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n', 1),
        (
            "trainer_state.json",
            '{"log_history": [{"step": 1, "loss": 2.0, "grad_norm": NaN}, {"step": 2, "loss": 1.0}]}',
            1,
        ),
        ("trainer_state.json", "[" * 100_000, 0),
        (
            "training_log.jsonl",
            '{"step": 1, "loss": 1e308}\n{"step": 2, "loss": -1e308}\n{"step": 3, "loss": 5e-324}\n',
            1,
        ),
    ],
)
def test_a_log_that_lies_beside(
    name: str, text: str, shown: int, artifact: Path, tmp_path: Path, opened: Callable[..., Any]
) -> None:
    """The readable part of a log beside the artifact is drawn; an unreadable log only gives a warning."""
    place = tmp_path / "artifact"
    shutil.copytree(artifact, place)
    (tmp_path / name).write_text(text)
    target = tmp_path / "page.html"
    written(target, "inspect", str(place), "--html", str(target))
    page = opened(target, "#tab=report")
    assert len(page.evaluate("graftcPage.data.curves") or []) == shown
    assert page.locator("#report .curves svg").count() == shown
    assert ("GC123" in page.locator("#report").inner_text()) == (shown == 0)
