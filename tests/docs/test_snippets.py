"""The pages are right: specs parse, Python runs, commands exist, and PEFT configs train what their specs train."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import textwrap
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.applications.trl.refusals import check_settings
from graftc.applications.trl.settings import read_settings
from graftc.cli import main
from graftc.compiler.adapting import ADAPT, EVAL
from graftc.passes.lowering.lower import LOWER
from graftc.specs import registry
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.io import parse_spec
from graftc.specs.pet.io import parse_pet_spec
from graftc.testing import tiny
from tools.docs.blocks import DOCS, ROOT, RUN, Block, CommandResult, blocks, pages, run_block
from tools.docs.cli import commands
from tools.matrix.walks import SCRIPTS, Page

PLUGIN = ROOT / "examples" / "plugin"
GUIDES = {
    "writing-a-method.md": PLUGIN,
    "writing-a-pass.md": ROOT / "examples" / "plugin_pass",
    "writing-an-exporter.md": ROOT / "examples" / "plugin_exporter",
}
"""Pages about plugins, each with the package that it shows."""
EXAMPLES = "errors.md"
PET = "pet.md"
"""The page of what is wrong: its specs have to fail."""
CONFIGS = ("sft.yaml", "loreft.yaml")
"""Files on the page about TRL that are its configs."""
ALL = [block for page in pages() for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in ALL if block.language == language]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example's method, as if its package were installed."""
    points = [EntryPoint("scale", "graftc_scale", registry.GROUP)]
    monkeypatch.syspath_prepend(PLUGIN)
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    registry.reload_methods()
    yield
    monkeypatch.undo()
    registry.reload_methods()
    for name in [name for name in sys.modules if name.partition(".")[0] == "graftc_scale"]:
        del sys.modules[name]


def test_there_are_snippets() -> None:
    assert len(of("yaml")) > 20 and len(of("python")) > 15 and len(of("console")) > 5
    fences = sum(len(re.findall(r"^`{3,}\w*", (DOCS / page).read_text("utf-8"), re.MULTILINE)) for page in pages())
    assert fences == 2 * len(ALL), "a fence was not understood: an unmarked language, or an option that is not known"


@pytest.mark.parametrize(
    "block",
    [
        b
        for b in of("yaml")
        if b.page not in (EXAMPLES, PET) and b.title not in CONFIGS and not b.mark.startswith("plugin")
    ],
    ids=str,
)
def test_specs_are_valid(block: Block) -> None:
    assert parse_spec(block.text, file=str(block)).adapt


@pytest.mark.parametrize("block", [b for b in of("yaml") if b.page == PET], ids=str)
def test_documents_of_pet_are_valid(block: Block) -> None:
    assert parse_pet_spec(block.text, file=str(block)).patterns


@pytest.mark.parametrize("block", [b for b in of("yaml") if b.title in CONFIGS], ids=str)
def test_configs_of_trl_are_valid(block: Block, tmp_path: Path) -> None:
    (tmp_path / block.title).write_text(block.text, encoding="utf-8")
    check_settings(read_settings("sft", tmp_path / block.title))


@pytest.mark.parametrize("block", [b for b in of("yaml") if b.mark == "plugin"], ids=str)
def test_specs_of_the_plugin_are_valid(block: Block, plugin: None) -> None:
    assert parse_spec(block.text).adapt[0].method == "scale"


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_parses(block: Block) -> None:
    ast.parse(textwrap.dedent(block.text))


@pytest.mark.parametrize("block", [b for b in ALL if b.page in GUIDES and b.title], ids=str)
def test_what_is_shown_of_a_plugin_is_in_it(block: Block) -> None:
    assert block.text in (GUIDES[block.page] / block.title).read_text(encoding="utf-8")


def test_the_pipelines_are_listed_whole() -> None:
    text = (DOCS / "writing-a-pass.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\| `"(\w+)"`[^|]* \| [^|]* \| [^|]* \| ([^|]*) \|$', text, re.MULTILINE)
    listed = {name: re.findall(r"`([^`]+)`", passes) for name, passes in rows}
    assert listed == {each.name: [own.name for own in each] for each in (ADAPT, EVAL, LOWER)}
    facts = re.findall(r'^\| `"(\w+)"` \| [^|]* \| [^|]* \|$', text, re.MULTILINE)
    assert facts == ["sites", "places", "adapted"]
    assert set(facts) <= {fact for each in ADAPT for fact in each.ensures}


def test_the_contract_is_listed_whole() -> None:
    from graftc.testing import DeploymentContract, MethodContract

    tests = {
        name for contract in (MethodContract, DeploymentContract) for name in dir(contract) if name.startswith("test_")
    }
    listed = re.findall(r"^\| `(test_\w+)` \|", (DOCS / "writing-a-method.md").read_text("utf-8"), re.MULTILINE)
    assert set(listed) == tests and len(listed) == len(tests)


def test_what_the_faq_misses_is_missing() -> None:
    (line,) = re.findall(r"\*\*Some methods\.\*\*.*?are not\.", (DOCS / "faq-peft.md").read_text("utf-8"), re.DOTALL)
    named = set(re.findall(r"`(\w+)`", line))
    assert named and not named & registry.method_specs().keys()
    assert "generate" not in dir(graftc.runtime.compiled.Compiled)


def command_lines() -> list[tuple[Block, str]]:
    return [
        (block, line[2:]) for block in of("console") for line in block.text.splitlines() if line.startswith("$ graftc ")
    ]


@pytest.mark.parametrize(("block", "line"), command_lines(), ids=lambda value: str(value).replace(" ", "_"))
def test_commands_exist_and_take_such_arguments(block: Block, line: str) -> None:
    _, name, *arguments = shlex.split(line, comments=True)
    command = commands()[name]
    command.make_context(name, arguments)  # raises a usage error if an option is unknown or an argument is missing


@pytest.mark.parametrize("word", sorted(set(re.findall(r"`graftc ([a-z-]+)", "".join(
    (DOCS / page).read_text("utf-8") for page in pages())))))  # fmt: skip
def test_commands_that_are_mentioned_exist(word: str) -> None:
    assert word in commands()


def _runnable() -> list[str]:
    """Return the pages with blocks to run in tests; `make walk` runs those of the others."""
    return [page for page in pages() if any(block.mark == "run" for block in blocks(page))]


def test_a_page_is_run_by_tests_or_by_the_walk() -> None:
    """No page has both marks, and the walk has every page that the tests do not run."""
    marks = {page: {block.mark for block in blocks(page)} & {*RUN} for page in pages()}
    walked = {step.path for script in SCRIPTS for step in script.steps if isinstance(step, Page)}
    assert {page for page, own in marks.items() if own == {*RUN}} == set()
    assert {f"docs/{page}" for page, own in marks.items() if own == {"walk"}} <= walked


@pytest.mark.sample("select.md", "merging.md")
@pytest.mark.slow
@pytest.mark.parametrize("page", _runnable())
def test_the_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scope: dict[str, Any] = {"__name__": page}

    def in_process(line: str) -> CommandResult:
        capsys.readouterr()
        command, *arguments = shlex.split(line, comments=True)
        assert command == "graftc", line
        status = main(arguments)
        return CommandResult(status, *capsys.readouterr())

    with warnings.catch_warnings():
        warnings.simplefilter("error", graftc.GraftWarning)
        for block in (block for block in blocks(page) if block.mark == "run"):
            run_block(block, scope, in_process)


def pairs() -> list[tuple[str, Block, Block]]:
    """Return PEFT configs with the specs beside them, and the family to compare them on."""
    matches = []
    every = blocks("faq-peft.md")
    for index, block in enumerate(every):
        if block.mark.startswith("same: "):
            matches.append((block.mark.removeprefix("same: "), block, every[index + 1]))
    return matches


@pytest.mark.slow
@pytest.mark.sample("3", "7", "11")
@pytest.mark.parametrize(("family", "config", "spec"), pairs(), ids=map(str, range(len(pairs()))))
def test_a_peft_config_and_its_spec_train_as_much(family: str, config: Block, spec: Block) -> None:
    peft = pytest.importorskip("peft")
    assert (config.title, spec.title) == ("PEFT", "spec.yaml")
    scope: dict[str, Any] = {
        name: getattr(peft, name) for name in ("LoraConfig", "PrefixTuningConfig", "PromptTuningConfig")
    }
    exec(compile(config.text, str(config), "exec"), scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny(family), scope["config"])
        ours = graftc.compile(parse_spec(spec.text), tiny(family))
    counts = [sum(t.numel() for t in model.parameters() if t.requires_grad) for model in (theirs, ours)]
    assert counts[0] == counts[1] > 0
    by_module = [getattr(module, "scaling", None) for module in theirs.modules()]
    scalings = {
        float(value) for by_adapter in by_module if isinstance(by_adapter, dict) for value in by_adapter.values()
    }
    own = ours.spec.adapt[0]
    if own.method == "lora":
        assert scalings == {own.scaling, *(own.model_copy(update=o.changes()).scaling for o in own.overrides)}


@pytest.mark.parametrize("block", [b for b in of("yaml") if b.page == EXAMPLES], ids=str)
def test_specs_of_the_error_page_are_wrong(block: Block) -> None:
    """Each spec is wrong by itself or for a model of the golden tests; only the former are tried here."""
    try:
        parse_spec(block.text, file="spec.yaml")
    except GraftError as error:
        page = (DOCS / EXAMPLES).read_text(encoding="utf-8")
        assert f"{error}\n" in page
