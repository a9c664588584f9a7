"""The MODEL argument: folders, hub ids and callables, and the errors if they give no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.runtime.sources.models import load_model
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import bert, tiny
from tests.kit.refusals import refused

CALLABLES = """\
import torch

value = 3
def text(): return "a model"
def fails(): raise ValueError("no weights here")
def leaves(): raise SystemExit(4)
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 3))
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models.py").write_text(CALLABLES, encoding="utf-8")
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    tiny("bert").save_pretrained(folder)
    return folder


def test_a_folder_gives_the_class_it_names_with_its_weights(saved: Path) -> None:
    model: Any = load_model(str(saved))
    assert type(model).__name__ == "BertForSequenceClassification" and not model.training
    for (name, a), (other, b) in zip(model.state_dict().items(), tiny("bert").state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_a_folder_on_meta_has_shapes_and_dtype_only(saved: Path) -> None:
    for weights in saved.glob("*.safetensors"):
        weights.unlink()
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    (saved / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    model = load_model(str(saved), meta=True)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in bert().state_dict().items()}


@pytest.mark.parametrize("meta", [False, True])
def test_a_callable(meta: bool) -> None:
    model = load_model("own_models:Own", meta=meta)
    assert {p.device.type for p in model.parameters()} == {"meta" if meta else "cpu"}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("own_models:Onw", "own_models has no 'Onw'", "did you mean 'own_models:Own'?"),
        ("own_modles:Own", "there is no module 'own_modles'", "did you mean 'own_models'?"),
        ("own_models:value", "own_models:value is not callable but of type int", "name a function"),
        ("own_models:text", "own_models:text returned str, not an nn.Module", "return the model"),
        ("own_models:fails", "own_models:fails failed: ValueError: no weights here", "Pass a transformers folder"),
        ("own_models:leaves", "own_models:leaves failed: SystemExit: 4", "Pass a transformers folder"),
        (
            "needs_more:x",
            "needs_more cannot be imported: ModuleNotFoundError: No module named",
            "Pass a transformers folder",
        ),
        ("graftc.tsting.families:bert", "there is no module 'graftc.tsting'", "did you mean 'graftc.testing'?"),
        ("./saved_models", "there is no folder './saved_models'", "MODEL is"),
        ("own_models.py", "'own_models.py' is a file", "did you mean '.'?"),
        (".", "'.' has no config.json", "MODEL is"),
        ("nobody/nothing", "'nobody/nothing' is not a folder here, and the hub has no such model", "MODEL is"),
    ],
)
def test_what_gives_no_model(text: str, message: str, hint: str) -> None:
    error = unloadable(text)
    assert error.message.startswith(message)
    assert error.hint is not None and error.hint.startswith(hint)


def test_a_callable_that_fails_says_in_which_line() -> None:
    (detail,) = unloadable("own_models:fails").details
    assert str(detail).endswith("own_models.py:5, in fails")


def test_a_misspelt_folder(saved: Path) -> None:
    assert unloadable("svaed").hint == "did you mean 'saved'?"
    assert unloadable("./svaed").hint == "did you mean 'saved'?"


@pytest.mark.parametrize(
    ("architectures", "message", "hint"),
    [
        (["BertForSequenceClasification"], "transformers has no model 'BertForSequenceClasification'", "did you mean"),
        (["OwnModel"], "transformers has no model 'OwnModel'", "to load your own class"),
        (["BertConfig"], "transformers has no model 'BertConfig'", "did you mean"),
        (None, "the config of 'saved' does not name its class", "add"),
    ],
)
def test_architectures_that_name_no_class(
    saved: Path, architectures: list[str] | None, message: str, hint: str
) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    (saved / "config.json").write_text(json.dumps({**config, "architectures": architectures}), encoding="utf-8")
    error = unloadable("saved")
    assert error.message.startswith(message) and (error.hint or "").startswith(hint)


def test_a_broken_config_and_broken_weights(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(b"not weights")
    assert unloadable("saved").message.startswith("saved is damaged: model.safetensors: ")
    (saved / "config.json").write_text("{", encoding="utf-8")
    assert unloadable("saved").message.startswith("the config.json of 'saved' cannot be read: ")


def test_an_adapter_folder_names_its_base(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}', encoding="utf-8")
    error = unloadable("adapter")
    assert (error.message, error.hint) == (
        "'adapter' contains a PEFT adapter, not a model",
        "use its base model: org/base",
    )


def unloadable(text: str) -> GraftError:
    error = refused(load_model, text, code="GC032")
    assert error.exit_code == 3
    return error
