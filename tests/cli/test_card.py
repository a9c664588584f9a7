"""``graftc card``: metadata that the hub reads, text that people read, commands that work, and hostile names."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt

import graftc
from graftc.runtime.artifact import open_artifact
from graftc.runtime.card.facts import CardFacts, artifact_facts
from graftc.runtime.card.markdown import code, fenced
from graftc.runtime.card.metadata import StatedMetadata, task_of
from graftc.runtime.card.page import render_card
from graftc.runtime.sources.reference import Reference
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import parse_spec
from graftc.testing.families import tiny
from tests.cli.support import run_here, run_valid
from tests.kit.folders import SPEC, adapted_folder, saved_base, tree_bytes
from tests.kit.markdown import HOSTILE, require_contained, tokens_of
from tests.runtime.artifact.support import edit_json

OPTIONS = [
    *("--base-model", "owner/base", "--license", "apache-2.0", "--language", "en", "--tag", "my tag"),
    *("--dataset", "owner/data", "--dataset", "imdb"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an artifact that folds, and one that folds only in part."""
    path = tmp_path_factory.mktemp("cards")
    base = saved_base(path / "base")
    adapted_folder(base).save(path / "artifact")
    adapted_folder(base, {"adapt": [*SPEC["adapt"], {"method": "prefix", "length": 3}]}).save(path / "kept")
    return path


@pytest.fixture(autouse=True)
def _there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.mark.full
def test_the_hub_reads_its_metadata(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "README.md"
    data = run_valid(capsys, "card", "artifact", "--out", str(out), *OPTIONS)
    card = ModelCard.load(out)
    assert isinstance(card.data, ModelCardData)
    known: Any = card.data.to_dict()  # type: ignore[no-untyped-call]
    assert known == {
        "library_name": "graftc",
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "pipeline_tag": "text-classification",
        "license": "apache-2.0",
        "language": ["en"],
        "datasets": ["owner/data", "imdb"],
        "tags": ["graftc", "lora", "my tag"],
    }
    assert {field: value for field, value in data["metadata"].items() if value} == known
    assert data["out"] == str(out) and data["card"] == out.read_text(encoding="utf-8")
    assert card.text.strip().startswith("# `artifact`")


@pytest.mark.slow
def test_what_is_not_known_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder's path is private to the artifact's author and does not appear in the card."""
    outcome = run_here(capsys, "card", "artifact")
    assert (outcome.status, outcome.err) == (0, "")
    assert set(yaml.safe_load(outcome.out.split("---")[1])) == {"library_name", "pipeline_tag", "tags"}
    assert str(Path.cwd()) not in outcome.out and "`base`" in outcome.out
    assert outcome.out == run_valid(capsys, "card", "artifact")["card"]


@pytest.mark.slow
def test_it_says_what_inspecting_says(capsys: pytest.CaptureFixture[str]) -> None:
    text = run_here(capsys, "card", "kept").out
    summary = run_valid(capsys, "inspect", "kept")["summary"]
    for adaptation in summary["adaptations"]:
        row = next(line for line in text.splitlines() if line.startswith(f"| `{adaptation['name']}` |"))
        assert f"| {adaptation['places']} | {adaptation['trainable_parameters']:,} |" in row
    assert f"{summary['base_parameters']:,} parameters of the base" in text
    size = sum(t.numel() * t.element_size() for t in open_artifact("kept").tensors().values())
    assert f"{size:,} bytes of adapter tensors" in text
    (spec,) = (t.content for t in tokens_of(text) if t.type == "fence" and t.info == "yaml")
    assert parse_spec(spec) == open_artifact("kept").spec
    (kept,) = open_artifact("kept").manifest.kept
    assert kept.name == "prefix" and re.search(r"\| `prefix` \| .*depends on the query", text)
    assert "The certificate of that fold passed:" in text and "`attention`, `inner` can be folded" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stated", "shown", "hidden"),
    [
        ({"method": "lora", "target": {"role": "attn.q"}}, ["rank: 8", "alpha: 16.0"], ["freeze_a", "target"]),
        ({"method": "lora", "rank": 8, "alpha": 4, "target": {"role": "attn.q"}}, ["rank: 8"], ["alpha"]),
        ({"method": "pfeiffer", "reduction": 4}, ["activation: relu"], ["reduction", "bottleneck"]),
    ],
    ids=["nothing stated", "a default stated", "another size stated"],
)
def test_it_states_the_defaults_that_the_spec_omits(stated: Any, shown: list[str], hidden: list[str]) -> None:
    compiled: Any = graftc.compile({"adapt": [stated]}, tiny("llama"))
    text: str = compiled.card(certify=False)
    row = text.split("## Spec")[1].split("has its default:")[1].split("## ")[0]
    assert all(value in row for value in shown) and not any(name in row for name in hidden)


@pytest.mark.full
@pytest.mark.parametrize("artifact", ["artifact", "kept"])
def test_its_commands_work(
    artifact: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = run_here(capsys, "card", artifact).out
    blocks = {t.info: t.content for t in tokens_of(text) if t.type == "fence"}
    commands = blocks["console"].splitlines()
    assert len(commands) == 4 and all("MODEL" in line or "inspect" in line for line in commands)
    monkeypatch.chdir(tmp_path)
    for name in (artifact, "base"):
        (tmp_path / name).symlink_to(folder / name, target_is_directory=True)
    for line in commands:
        outcome = run_here(capsys, *shlex.split(line.replace("MODEL", "base"))[2:])
        assert outcome.status == 0, f"{line}\n{outcome.err}"
    assert (tmp_path / "model.onnx").is_file()
    exec(compile(blocks["python"].replace("MODEL", "base").replace("merged", "again"), "card", "exec"), {})
    assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "merged").iterdir()}


@pytest.mark.full
def test_a_live_model_has_the_same_card(capsys: pytest.CaptureFixture[str]) -> None:
    text = graftc.load("artifact").card(
        base_model="owner/base", license="apache-2.0", language=["en"], tags=["my tag"], datasets=["owner/data", "imdb"]
    )
    known = run_here(capsys, "card", "artifact", *OPTIONS).out
    for part in ("## Figures", "## Places", "## Spec", "## Folding"):
        own, other = (re.search(f"{part}\n.*?\n## ", card, re.DOTALL) for card in (text, known))
        assert own is not None and other is not None
        assert re.sub(r"\d\.\de[-+]\d\d", "#", own[0]) == re.sub(r"\d\.\de[-+]\d\d", "#", other[0])
    assert text.split("---")[1] == known.split("---")[1]
    assert "No fold was certified." in graftc.load("artifact").card(certify=False)


@pytest.mark.slow
def test_files_are_not_overwritten_or_put_into_the_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree_bytes(Path("artifact"))
    out = tmp_path / "card.md"
    assert run_here(capsys, "card", "artifact", "-o", str(out)).out == f"wrote {out}\n"
    assert run_here(capsys, "card", "artifact", "-o", str(out)).err.startswith("GC063")
    assert run_here(capsys, "card", "artifact", "-o", str(out), "--force", "--license", "mit").status == 0
    assert "license: mit" in out.read_text(encoding="utf-8")
    assert run_here(capsys, "card", "artifact", "-o", "artifact/README.md", "--force").err.startswith("GC063")
    assert tree_bytes(Path("artifact")) == before
    assert [p.name for p in tmp_path.iterdir()] == ["card.md"]


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [
        ["--base-model", "../base"], ["--base-model", "a/b/c"], ["--base-model", "x\n---"], ["--license", "Apache 2"],
        ["--license", "mit\nlicense: gpl"], ["--language", "English!"], ["--tag", "<b>"], ["--tag", ""],
        ["--dataset", "a/b/c"], ["--dataset", "x\n---"],
    ],
    ids=str,
)  # fmt: skip
def test_metadata_that_the_hub_does_not_take(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    data = run_valid(capsys, "card", "artifact", *options, status=2)
    assert data["error"]["code"] == "GC073" and data["error"]["hint"]
    assert run_valid(capsys, "card", "missing", status=3)["error"]["code"] == "GC080"


@pytest.mark.slow
def test_a_certificate_that_is_none_is_damage(folder: Path, tmp_path: Path) -> None:
    adapted_folder(folder / "base").save(tmp_path / "artifact")
    edit_json(tmp_path / "artifact", "certificates/fold.json", '{"passed": "yes"}\n')
    with pytest.raises(GraftError, match="GC082"):
        artifact_facts(open_artifact(tmp_path / "artifact"))


@pytest.mark.parametrize(
    ("family", "task"), [("llama", "text-generation"), ("bert", "text-classification"), ("t5", None)]
)
def test_the_task_is_that_of_the_class(family: str, task: str | None) -> None:
    assert task_of(type(tiny(family)).__name__) == task
    assert task_of("Own") is None


@pytest.mark.slow
def test_the_tasks_are_those_of_transformers() -> None:
    from transformers.modelcard import TASK_MAPPING

    theirs = {task: set(names.values()) for task, names in TASK_MAPPING.items() if task != "text2text-generation"}
    classes = set().union(*theirs.values())
    for name in classes:
        tasks = [task for task, names in theirs.items() if name in names]
        assert task_of(name) == (tasks[0] if len(tasks) == 1 else None)


@pytest.fixture(scope="module")
def facts(folder: Path) -> CardFacts:
    return artifact_facts(open_artifact(folder / "kept"))


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_that_mean_harm(name: str, facts: CardFacts) -> None:
    """Whatever the names, a reader sees the same headings, tables, blocks and lines, and nothing that a name adds."""
    sites = tuple(replace(s, adaptation=name, roles=(name,), module=name, method=name) for s in facts.snapshot.sites)
    adaptations = tuple(replace(a, name=f"{name}{i}", method=name) for i, a in enumerate(facts.summary.adaptations))
    harmed = replace(
        facts,
        name=name,
        snapshot=replace(facts.snapshot, sites=sites, spec=_spec(name)),
        summary=replace(facts.summary, model=name, adaptations=adaptations),
        base=Reference("folder", f"/home/{name}"),
        kept={name: name},
        versions={"graftc": name},
        dtype=name,
    )
    text, _ = render_card(harmed, StatedMetadata(base_model="owner/base"))
    plain, _ = render_card(facts, StatedMetadata(base_model="owner/base"))
    require_contained(text, plain)
    assert max(map(len, text.splitlines())) < 2000
    assert set(yaml.safe_load(text.split("---\n")[1])) == {
        *("library_name", "base_model", "base_model_relation", "tags"),
        *(["pipeline_tag"] if "pipeline_tag" in text.split("---\n")[1] else []),
    }


def _spec(name: str) -> Any:
    """Return a spec with the name where names are free: in a pattern."""
    from graftc.specs.document import Spec

    target = {"modules": ["".join(c for c in name if c.isalnum())[:50] or "x"]}
    return Spec.model_validate({"adapt": [{"method": "lora", "target": target}], "train": []})


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_code_and_blocks_show_what_they_are_of(text: str) -> None:
    """A reader gets the text back: a printable, short form of a line, and all of a block."""
    from graftc.specs.errors.text import abridged, printable

    (inline,) = [t for t in MarkdownIt("commonmark").parse(code(text)) if t.type == "inline"]
    shown = "".join(child.content for child in inline.children or () if child.type != "html_inline")
    assert shown == abridged(" ".join(printable(text).split()), 100)
    (block,) = MarkdownIt("commonmark").parse(fenced(text))
    assert block.type == "fence" and block.content == printable(text).rstrip() + "\n"
