"""An error names the object that was passed instead of a spec or a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.refusals import refused
from tests.runtime.interop.trl_runs import tokenizer

MODEL = nn.Linear(3, 3)
SPEC = {"adapt": [{"method": "lora", "target": {"modules": "**"}}]}
WRONG: dict[str, Callable[[], Any]] = {
    "a tokenizer": tokenizer,
    "example inputs": lambda: {"input_ids": torch.ones(1, 2, dtype=torch.long)},
    "example inputs, in order": lambda: (torch.ones(1, 2),),
    "example inputs, alone": lambda: torch.ones(1, 2),
    "a transformers config": lambda: tiny("bert").config,
}
SPECS: dict[str, Callable[[], Any]] = {
    "a spec": lambda: SPEC,
    "a spec, read": lambda: graftc.Spec.model_validate(SPEC),
    "a PEFT config": lambda: pytest.importorskip("peft").LoraConfig(target_modules=["q"]),
    "a PEFT config, as data": lambda: {"peft_type": "LORA", "target_modules": ["q"]},
}
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "compile": graftc.compile,
    "check": graftc.check,
    "tune": lambda spec, model: graftc.tune(spec, model, print),
    "sweep": lambda spec, model: graftc.sweep(spec, model, print, float, rates=[1e-3]),
    "plan": graftc.plan,
    "pet": lambda spec, model: graftc.pet(spec, model, None, "data"),
}


def message_of(function: str, spec: Any, model: Any) -> str:
    error = refused(FUNCTIONS[function], spec, model, code="GC073")
    assert f"graftc.{function}(spec, model" in error.hint
    return error.message


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_swapped(name: str, function: str) -> None:
    what = name.partition(",")[0]
    message = message_of(function, MODEL, SPECS[name]())
    assert message == f"expected a spec, got a model: a Linear; expected a model, got {what}"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", WRONG)
def test_another_thing_in_the_place_of_the_spec(name: str, function: str) -> None:
    what = name.partition(",")[0]
    assert message_of(function, WRONG[name](), MODEL).startswith(f"expected a spec, got {what}")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", [*WRONG, *SPECS])
def test_another_thing_in_the_place_of_the_model(name: str, function: str) -> None:
    what = name.partition(",")[0]
    assert message_of(function, SPEC, {**WRONG, **SPECS}[name]()).startswith(f"expected a model, got {what}")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_two_models(function: str) -> None:
    assert message_of(function, MODEL, MODEL) == "expected a spec, got a model: a Linear"


# --- folders ---------------------------------------------------------------------------------------------------------

FOLDERS: dict[str, Callable[[Any, Any], Any]] = {"load": graftc.load, "import_peft": graftc.import_peft}


def refused_folder(function: str, folder: Any, model: Any) -> GraftError:
    with pytest.raises(GraftError) as caught:
        FOLDERS[function](folder, model)
    assert caught.value.code == "GC073"
    return caught.value


@pytest.mark.parametrize("path", ["adapter", Path("adapter"), "./a/b"], ids=str)
@pytest.mark.parametrize("function", [*FOLDERS, *FUNCTIONS])
def test_a_model_and_a_path(function: str, path: Any) -> None:
    place = "folder" if function in FOLDERS else "spec"
    with pytest.raises(GraftError) as caught:
        {**FOLDERS, **FUNCTIONS}[function](MODEL, path)
    error = caught.value
    assert error.code == "GC073" and (error.hint or "").startswith(f"swap them: graftc.{function}({place}, model")
    assert error.message == f"expected a {place}, got a model: a Linear; expected a model, got a path"


@pytest.mark.parametrize("paths", [["a", "b"], {"one": "a", "two": Path("b")}], ids=["list", "mapping"])
def test_a_model_and_several_folders(paths: Any) -> None:
    error = refused_folder("import_peft", MODEL, paths)
    assert error.message == "expected a folder, got a model: a Linear; expected a model, got paths"
    assert error.hint == "swap them: graftc.import_peft(folder, model)"


@pytest.mark.parametrize("function", FOLDERS)
@pytest.mark.parametrize("name", [*WRONG, *SPECS])
def test_another_thing_in_the_place_of_the_folder(name: str, function: str) -> None:
    what = name.partition(",")[0]
    error = refused_folder(function, {**WRONG, **SPECS}[name](), MODEL)
    assert error.message.startswith(f"expected a folder, got {what}")
    call = "graftc.compile(spec, model)" if name in SPECS else f"graftc.{function}(folder, model)"
    assert call in (error.hint or "")


@pytest.mark.parametrize("function", FOLDERS)
@pytest.mark.parametrize("name", [*WRONG, *SPECS])
def test_another_thing_beside_a_folder(name: str, function: str) -> None:
    what = name.partition(",")[0]
    error = refused_folder(function, "adapter", {**WRONG, **SPECS}[name]())
    assert error.message.startswith(f"expected a model, got {what}")
    assert f"graftc.{function}(folder, model)" in (error.hint or "")


@pytest.mark.parametrize("function", FOLDERS)
def test_two_models_and_no_folder(function: str) -> None:
    assert refused_folder(function, MODEL, MODEL).message == "expected a folder, got a model: a Linear"


def test_a_path_in_the_place_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    error = refused_folder("import_peft", "adapter", tmp_path)
    assert error.message.startswith("expected a model, got a path")
    assert f"graftc.load_base({str(tmp_path)!r})" in (error.hint or "")


@pytest.mark.parametrize(("file", "text"), [("adapter_config.json", "{}"), ("manifest.json", '{"artifact": "graftc"}')])
def test_an_adapter_in_the_place_of_the_base(file: str, text: str, tmp_path: Path) -> None:
    for name, content in ((file, text), ("config.json", "{}")):
        (tmp_path / name.partition(".")[0]).mkdir()
        (tmp_path / name.partition(".")[0] / name).write_text(content)
    adapter, base = tmp_path / file.partition(".")[0], tmp_path / "config"
    with pytest.raises(GraftError, match="expected the base's folder, got an adapter") as caught:
        graftc.merge_checkpoint(base, adapter)
    assert caught.value.code == "GC073" and caught.value.hint == "swap them: graftc.merge_checkpoint(adapter, model)"


@pytest.mark.parametrize("order", [(MODEL, None), ("adapter", MODEL), (MODEL, "adapter"), (SPEC, "base")], ids=str)
def test_what_is_in_memory_does_not_stream(order: tuple[Any, Any]) -> None:
    with pytest.raises(GraftError, match="expected the folder of the") as caught:
        graftc.merge_checkpoint(*order)
    assert caught.value.code == "GC073" and "compiled.merge()" in (caught.value.hint or "")


@pytest.mark.parametrize("value", [MODEL, None, 5, [], {}], ids=str)
def test_what_is_no_name_of_a_base(value: Any) -> None:
    with pytest.raises(GraftError) as caught:
        graftc.load_base(value)
    assert caught.value.code == "GC073"
