"""Arguments of ``forward`` may have any name that Python allows: in captures, their cache, artifacts and exports."""

from __future__ import annotations

import keyword
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "linear"}}]}

NAMES = (
    ("X",),
    ("inputIds",),
    ("x", "X"),
    ("X", "x"),
    ("Xa", "xA", "xa"),
    ("x_1", "X_1", "x"),
    ("input", "Input"),
    ("self_", "SELF"),
    ("torch", "inf", "device"),
    ("code", "graph"),
    ("größe", "Größe"),
    ("变量",),
    ("_x", "__x", "x__"),
    ("model", "args", "kwargs"),
)


class Named(nn.Module):
    """A model with inputs of any names, whose result depends on their order."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)


def model_with(names: tuple[str, ...]) -> nn.Module:
    assert all(name.isidentifier() and not keyword.iskeyword(name) for name in names)
    scope: dict[str, Any] = {}
    this = "module"  # no input has this name
    exec(f"def forward({this}, {', '.join(names)}):\n    return {this}.linear({' - 2 * '.join(names)})", scope)
    torch.manual_seed(0)
    return type("Named", (Named,), {"forward": scope["forward"]})().eval()


def inputs_of(names: tuple[str, ...], rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {name: torch.randn(rows, 6, generator=generator) for name in names}


def case_of(names: tuple[str, ...]) -> str:
    return "-".join(names).encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("names", NAMES, ids=case_of)
def test_compiled_and_saved(names: tuple[str, ...], tmp_path: Path) -> None:
    model = model_with(names)
    compiled = graftc.compile(SPEC, model, example_inputs=inputs_of(names, 3)).eval()
    given = inputs_of(names, 4)
    torch.testing.assert_close(compiled(**given), model(**given))
    torch.testing.assert_close(compiled(*given.values()), model(*given.values()))
    again = graftc.compile(SPEC, model, example_inputs=inputs_of(names, 3)).eval()
    torch.testing.assert_close(again(**given), model(**given))
    perturb(compiled)
    expected = compiled(**given)
    assert (expected - model(**given)).abs().max() > 0.1
    compiled.save(tmp_path / "artifact")
    torch.testing.assert_close(graftc.load(tmp_path / "artifact", model=model).eval()(**given), expected)
    torch.testing.assert_close(compiled.merge()(**given), expected)


@pytest.mark.sample("input-Input")
@pytest.mark.slow
@pytest.mark.parametrize("names", [("x", "X"), ("inputIds", "input"), ("Größe",), ("input", "Input")], ids=case_of)
def test_onnx(names: tuple[str, ...], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    compiled = graftc.compile(SPEC, model_with(names), example_inputs=inputs_of(names, 3)).eval()
    perturb(compiled)
    session = onnxruntime.InferenceSession(str(compiled.export(tmp_path / "model.onnx")))
    assert [taken.name for taken in session.get_inputs()] == list(names)
    given = inputs_of(names, 4)
    (output,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    torch.testing.assert_close(torch.from_numpy(output), compiled(**given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [("x", "X"), ("inputIds", "input"), ("Größe",)], ids=case_of)
def test_pt2(names: tuple[str, ...], tmp_path: Path) -> None:
    compiled = graftc.compile(SPEC, model_with(names), example_inputs=inputs_of(names, 3)).eval()
    perturb(compiled)
    file = compiled.export(tmp_path / "model.pt2", format="pt2")
    given = inputs_of(names, 4)
    (output,) = torch.export.load(file).module()(**given).values()
    torch.testing.assert_close(output, compiled(**given))


@pytest.mark.parametrize(
    ("format", "names"),
    [("pt2", ("input", "Input")), ("pt2", ("torch",)), ("pt2", ("self_", "SELF")), ("onnx", ("self_", "SELF"))],
)
def test_names_that_a_file_cannot_have(format: Literal["pt2", "onnx"], names: tuple[str, ...], tmp_path: Path) -> None:
    compiled = graftc.compile(SPEC, model_with(names), example_inputs=inputs_of(names, 3))
    with pytest.raises(GraftError) as caught:
        compiled.export(tmp_path / "model", format=format)
    assert caught.value.code == "GC060"
    assert not list(tmp_path.iterdir())
