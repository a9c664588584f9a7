"""Options of exports: a format accepts those that it declares and refuses all others, also on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.export.exporter import ExportOption
from graftc.runtime.export.options import options_for
from graftc.runtime.export.registry import exporters
from graftc.specs.errors.diagnostics import GraftError

FORMATS = exporters()
OPTIONS = (
    "example_inputs",
    "inputs",
    "adapter_format",
    "dtype",
    "server",
    "max_rank",
    "graph",
    "slot",
    "logits",
    "opset",
)
GIVEN: dict[str, Any] = {
    "example_inputs": {"x": torch.zeros(2, 6)},
    "inputs": ["low"],
    "dtype": "f16",
    "server": "vllm",
    "max_rank": 8,
    "adapter_format": "onnx_adapter",
    "graph": "model.onnx",
    "slot": "low",
    "logits": "all",
    "opset": 20,
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(x)}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    spec = {"adapt": [{"name": "low", "method": "lora", "rank": 2, "target": {"modules": "*"}}]}
    compiled = graftc.compile(spec, Net().eval(), {"x": torch.zeros(2, 6)}).eval()
    return {"compiled": compiled, "merged": compiled.merge(allow_unchanged=True)}


def _misplaced() -> Iterator[Any]:
    for format, own in FORMATS.items():
        for option in OPTIONS:
            if option not in {each.name for each in own.options}:
                yield format, option


def test_the_table_is_whole() -> None:
    """Every option belongs to some format and has a value here."""
    assert {option.name for own in FORMATS.values() for option in own.options} == set(OPTIONS) == set(GIVEN)


def test_a_value_that_an_option_does_not_allow() -> None:
    """The code is that of wrong arguments; the allowed words, or the words of the option's own reader, are shown."""
    with pytest.raises(GraftError, match="dtype is 'f13'") as caught:
        options_for(FORMATS["gguf"], {"dtype": "f13"})
    assert caught.value.code == "GC073" and caught.value.hint == "use f32, f16 or bf16"
    with pytest.raises(GraftError, match="digits is 'x': invalid literal for int") as caught:
        ExportOption("digits", "Digits behind the point", read=int).checked("x")
    assert caught.value.code == "GC073" and caught.value.hint == "Digits behind the point"


@pytest.mark.parametrize("kind", ["compiled", "merged"])
@pytest.mark.parametrize(("format", "option"), list(_misplaced()))
def test_what_a_format_does_not_take(
    models: dict[str, Any], format: str, option: str, kind: str, tmp_path: Path
) -> None:
    """Options are refused with a code before anything is written, naming the right format or an alternative."""
    with pytest.raises(GraftError) as caught:
        models[kind].export(tmp_path / "made", format, **{option: GIVEN[option]})
    assert caught.value.code == "GC073"
    assert repr(format) in caught.value.message and option in caught.value.message and caught.value.hint
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_given(format: str, option: str) -> None:
    """Default values do not count as options."""
    assert options_for(FORMATS[format], {option: None}) == {}
    assert options_for(FORMATS[format], {"inputs": ()}) == options_for(FORMATS[format], {"inputs": []})


@pytest.mark.parametrize(
    ("format", "given", "words"),
    [
        ("onnx", {"inputs": 5}, "the names must be a string or a list of strings, but they are 5"),
        ("onnx", {"inputs": [5]}, "the names must be"),
        ("peft", {"server": "vllm", "max_rank": 0}, "max_rank must be a positive integer, got 0"),
        ("peft", {"server": "vllm", "max_rank": True}, "max_rank must be a positive integer, got True"),
        ("peft", {"max_rank": 8}, "a server's limit"),
    ],
)
def test_values_that_are_none(models: dict[str, Any], format: str, given: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match=words) as caught:
        models["compiled"].export(tmp_path / "made", format, **given)
    assert caught.value.code == "GC073" and not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onx", "", None, 3, "ONNX"])
def test_unknown_formats(models: dict[str, Any], format: Any, tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="unknown") as caught:
        models["compiled"].export(tmp_path / "made", format)
    assert caught.value.code == "GC060" and not any(tmp_path.iterdir())


def test_one_name_is_a_list_of_one(models: dict[str, Any], tmp_path: Path) -> None:
    path = models["compiled"].export(tmp_path / "made.pt2", "pt2", inputs="low")
    assert [file.name for file in sorted(tmp_path.iterdir())] == [path.name, "made.pt2.low.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["peft", "gguf", "onnx-generate", "pt2"])
def test_partial_merges(format: Any, tmp_path: Path) -> None:
    """The rest of a partial merge can only be exported as a graph, and its options are checked as well."""
    from graftc.testing import perturb, tiny

    adapt = [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}, {"method": "prefix", "length": 2}]
    compiled = graftc.compile({"adapt": adapt}, tiny("llama").eval()).eval()
    perturb(compiled)
    partial = compiled.merge_partially()
    given: Any = {"inputs": 3} if format == "pt2" else {"example_inputs": [1]} if format == "onnx-generate" else {}
    with pytest.raises(GraftError) as caught:
        partial.export(tmp_path / "made", format, **given)
    assert caught.value.code == ("GC060" if format in ("peft", "gguf") else "GC073")
    assert not any(tmp_path.iterdir())


WORDS: dict[str, tuple[str, ...]] = {
    "inputs": ("--inputs", "low"),
    "dtype": ("--dtype", "f16"),
    "server": ("--for", "vllm"),
    "max_rank": ("--max-rank", "8"),
    "graph": ("--for-graph", "model.onnx"),
    "slot": ("--slot", "low"),
    "budget": ("--budget", "1"),
    "base": ("--base", "full"),
    "allow_unchanged": ("--allow-unchanged",),
    "merge": ("--merge",),
}
FOLDING = ("budget", "base", "allow_unchanged")


def _words() -> Iterator[Any]:
    for format, option in _misplaced():
        if option in WORDS:
            yield format, [], option
    for option in (*FOLDING, "merge"):
        yield "peft", [], option
    for option in FOLDING:
        for format in ("onnx", "onnx-generate", "pt2", "gguf"):
            yield format, ["--no-merge"], option


@pytest.mark.parametrize(("format", "more", "option"), list(_words()))
def test_on_the_command_line(
    format: str, more: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Options are refused before anything is loaded: the artifact does not exist."""
    from tests.cli.support import run_here

    words = ["export", str(tmp_path / "none"), "--format", format, "--out", str(tmp_path / "made"), "--json", *more]
    error = run_here(capsys, *words, *WORDS[option]).data["error"]
    assert error["code"] == "GC090" and WORDS[option][0] in error["message"] and error["hint"]
