"""The specs of examples/: each fits the models that it is for, and the examples page lists all of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graftc.cli.schemas import DIALECT, published_schema
from tests.cli.support import run_here
from tests.kit.places import EXAMPLES

SPECS = sorted(EXAMPLES.glob("specs/*.yaml"))
FITTING = {
    "attention_lora": {"bert": 4, "gpt2": 4, "gpt_neox": 4, "llama": 4, "mixtral": 4, "t5": 12, "vit": 4},
    "all_linear": {"llama": 14},
    "classifier": {"bert": 4, "vit": 4},
    "cross_attention": {"t5": 10},
    "experts": {"mixtral": 8},
    "houlsby": {"bert": 9, "gpt2": 9, "t5": 22, "vit": 9},
    "ia3": {"bert": 6, "gpt2": 6, "llama": 6, "t5": 16, "vit": 6},
    "layer_ranks": {"bert": 8, "gpt2": 8, "vit": 8},
    "new_tokens": {"gpt2": 4, "llama": 4},
    "norms": {"bert": 5, "vit": 5},
    "parallel_adapters": {"bert": 4, "llama": 4, "t5": 8},
    "pfeiffer": {"bert": 2, "gpt2": 2, "gpt_neox": 2, "llama": 2, "mixtral": 2, "roberta": 2, "t5": 4, "vit": 2},
    "pissa": {"bert": 8, "llama": 8},
    "rslora": {"bert": 8, "gpt2": 8},
}
"""The sites that the adaptations of a spec have in tiny models."""


@pytest.mark.slow
@pytest.mark.sample("classifier-bert", "houlsby-bert", "norms-vit", "pissa-bert")
@pytest.mark.parametrize(
    ("name", "family"),
    [pytest.param(name, family, id=f"{name}-{family}") for name in FITTING for family in FITTING[name]],
)
def test_it_fits(capsys: pytest.CaptureFixture[str], name: str, family: str) -> None:
    path = str(EXAMPLES / "specs" / f"{name}.yaml")
    outcome = run_here(capsys, "check", path, "--model", f"graftc.testing.families:{family}", "--json")
    assert outcome.status == 0, outcome.out
    adapted = [entry for entry in outcome.data["adaptations"] if entry["method"] not in ("full", "tokens")]
    assert sum(entry["sites"] for entry in adapted) == FITTING[name][family]
    assert outcome.data["trainable_parameters"] > 0


def test_every_spec_is_tried() -> None:
    assert {path.stem for path in SPECS} == set(FITTING)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_it_begins_with_what_it_is_for_and_its_schema(path: Path) -> None:
    first, second, third, *_ = path.read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"# [A-Z].{20,}\.", first) and third == "version: 1"
    match = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", second)
    assert match is not None
    schema = (path.parent / match[1]).resolve()
    assert schema.is_file() and schema.stem == "spec" and published_schema("spec")["$schema"] == DIALECT


def test_the_page_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\(([^)]+)\)", text)
    there = [
        *(p.name for pattern in ("*.py", "*.ipynb") for p in EXAMPLES.glob(pattern)),
        *(f"specs/{p.name}" for p in SPECS),
        "plugin",
        "plugin_exporter",
        "plugin_pass",
        "vision_language",
    ]
    assert sorted(listed) == sorted(there)


def test_scripts_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, path.name
