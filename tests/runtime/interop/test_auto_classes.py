"""transformers' Auto classes load the folders that ``save_pretrained`` of a compiled model writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import tiny
from graftc.testing.compare import flat, inputs_for, largest_difference
from tests.kit.models import adapted

KINDS: dict[str, Any] = {"bert": AutoModelForSequenceClassification, "gpt2": AutoModelForCausalLM}
METHODS = ("lora", "pfeiffer", "prefix")


def of_a_folder(family: str, method: str, folder: Path) -> Any:
    """Return a perturbed compiled model of a family whose base is saved in a folder."""
    tiny(family).save_pretrained(folder / "base")
    base = KINDS[family].from_pretrained(folder / "base")
    entry = {"method": method, **({"target": {"role": ["attn.q"]}, "rank": 2} if method == "lora" else {})}
    return adapted(base, entry, seed=0)


@pytest.mark.slow
@pytest.mark.sample("bert-lora")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", KINDS)
def test_it_is_loaded_with_its_adapters(family: str, method: str, tmp_path: Path) -> None:
    compiled = of_a_folder(family, method, tmp_path)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "other.txt").write_text("of another library", encoding="utf-8")
    for _ in range(2):  # the second call overwrites the first one's files
        compiled.save_pretrained(folder, safe_serialization=True)
    assert (folder / "other.txt").read_text(encoding="utf-8") == "of another library"
    loaded = KINDS[family].from_pretrained(folder)
    inputs = inputs_for(compiled, (2, 5))
    assert largest_difference(flat(loaded.eval()(**inputs)), flat(compiled(**inputs))) == 0
    assert type(loaded).__name__ == type(compiled).__name__
    assert AutoConfig.from_pretrained(folder).source["model_type"] == family
    with pytest.raises(GraftError, match="does not load") as caught:
        AutoModel.from_pretrained(folder)
    assert caught.value.code == "GC072"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("auto")
    compiled = of_a_folder("bert", "lora", folder)
    compiled.save_pretrained(folder / "saved")
    return compiled, folder


@pytest.mark.parametrize(
    "options",
    [{"state_dict": {"x": torch.ones(1)}}, {"push_to_hub": True}, {"safe_serialization": False}, {"variant": "fp16"}],
)
def test_another_form_is_refused(saved: tuple[Any, Path], options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(GraftError) as caught:
        saved[0].save_pretrained(tmp_path / "new", **options)
    assert caught.value.code == "GC072" and not (tmp_path / "new").exists()


def test_only_the_main_process_writes(saved: tuple[Any, Path], tmp_path: Path) -> None:
    saved[0].save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"num_labels": 7}])
def test_it_is_loaded_as_it_was(saved: tuple[Any, Path], options: dict[str, Any]) -> None:
    with pytest.raises(GraftError) as caught:
        AutoModelForSequenceClassification.from_pretrained(saved[1] / "saved", **options)
    assert caught.value.code == "GC072"


def test_what_is_there_is_not_replaced(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """A foreign folder with this name is not replaced."""
    (tmp_path / "graftc").mkdir()
    (tmp_path / "graftc" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(GraftError) as caught:
        saved[0].save_pretrained(tmp_path)
    assert caught.value.code == "GC063"
    assert (tmp_path / "graftc" / "mine.txt").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "config.json").exists()


def test_a_model_without_a_config_is_told(tmp_path: Path) -> None:
    spec = {"adapt": [{"method": "lora", "rank": 1, "target": {"modules": "0"}}]}
    compiled = graftc.compile(spec, torch.nn.Sequential(torch.nn.Linear(3, 4)), (torch.ones(2, 3),))
    with pytest.raises(GraftError) as caught:
        compiled.save_pretrained(tmp_path / "new")
    assert caught.value.code == "GC032" and not (tmp_path / "new").exists()


@pytest.mark.full
def test_another_process_imports_one_module(saved: tuple[Any, Path]) -> None:
    """Without the import of `graftc.auto`, transformers reports that it does not know the model type."""
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A\n"
        "try: A.from_pretrained(sys.argv[1])\n"
        "except ValueError as error: assert 'graftc' in str(error)\n"
        "else: sys.exit(3)\n"
        "import graftc.auto; print(type(A.from_pretrained(sys.argv[1])).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code, saved[1] / "saved"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == type(saved[0]).__name__
    assert json.loads((saved[1] / "saved" / "config.json").read_text(encoding="utf-8"))["model_type"] == "graftc"


def test_the_folder_of_the_base_is_refused(saved: tuple[Any, Path]) -> None:
    """Saving into the base's folder is refused, because it would overwrite its config."""
    compiled, folder = saved
    before = (folder / "base" / "config.json").read_bytes()
    with pytest.raises(GraftError) as caught:
        compiled.save_pretrained(folder / "base")
    assert caught.value.code == "GC063"
    assert (folder / "base" / "config.json").read_bytes() == before and not (folder / "base" / "graftc").exists()
