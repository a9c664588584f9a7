"""Components of merged models as ONNX files: run one after another, they compute what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing import families, perturb
from tests.zoo.sized_images import qwen2_vl
from tests.zoo.vision_language import llava

ort = pytest.importorskip("onnxruntime")
SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.{q_proj,v_proj}"}}]}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor], Path]:
    """A merged LLaVA, the inputs of a call, and the folder of its components."""
    small = llava()
    torch.manual_seed(0)
    compiled = graftc.compile(SPEC, small.model, small.first, cache=False).eval()
    perturb(compiled)
    merged, folder = compiled.merge(), tmp_path_factory.mktemp("components") / "llava"
    assert merged.export_components(folder, small.first) == folder
    return merged, dict(small.first), folder


def run(folder: Path, entry: dict[str, Any], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(folder / entry["file"]), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [one["name"] for one in entry["inputs"]]
    names = [one["name"] for one in entry["outputs"]]
    return dict(zip(names, session.run(names, values), strict=True))


@pytest.mark.full
def test_what_they_give_one_after_the_other_is_what_the_model_gives(written: tuple[Any, Any, Path]) -> None:
    merged, inputs, folder = written
    manifest = json.loads((folder / "components.json").read_text(encoding="utf-8"))
    assert manifest["version"] == 1 and manifest["left_out"] == []
    entries = {entry["module"]: entry for entry in manifest["components"]}
    assert set(entries) == {
        *("model.vision_tower", "model.multi_modal_projector", "model.language_model.embed_tokens"),
        *("model.language_model", "lm_head"),
    }
    arrays = {name: value.numpy() for name, value in inputs.items()}
    tower, projector = entries["model.vision_tower"], entries["model.multi_modal_projector"]
    embed, language = entries["model.language_model.embed_tokens"], entries["model.language_model"]
    assert tower["inputs"][0]["from"] == "pixel_values" and embed["inputs"][0]["from"] == "input_ids"

    shown = run(folder, tower, {"pixel_values": arrays["pixel_values"]})
    (feature,) = projector["inputs"]
    features = shown[next(name for name in shown if name.startswith("hidden_states"))][:, 1:]
    projected = run(folder, projector, {feature["name"]: features})["output"]
    hidden = run(folder, embed, {embed["inputs"][0]["name"]: arrays["input_ids"]})["output"]
    token = merged.config.image_token_id
    hidden[arrays["input_ids"] == token] = projected.reshape(-1, projected.shape[-1])
    given = {"inputs_embeds": hidden, "attention_mask": arrays["attention_mask"]}
    behind = run(folder, language, {one["name"]: given[one["name"]] for one in language["inputs"]})["last_hidden_state"]
    logits = run(folder, entries["lm_head"], {"input": behind})["output"]
    with torch.no_grad():
        wanted = merged(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(logits)[kept], wanted[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_sizes_of_texts_vary_and_nothing_of_the_inputs_is_written(written: tuple[Any, Any, Path]) -> None:
    _, _, folder = written
    manifest = json.loads((folder / "components.json").read_text(encoding="utf-8"))
    language = next(entry for entry in manifest["components"] if entry["module"] == "model.language_model")
    assert all(isinstance(size, str) for one in language["inputs"] for size in one["shape"][:2])
    width = next(one["shape"][2] for one in language["inputs"] if len(one["shape"]) == 3)
    for rows, length in ((1, 3), (5, 11)):
        values = {
            one["name"]: np.ones((rows, length), np.int64)
            if len(one["shape"]) == 2
            else np.random.default_rng(0).normal(size=(rows, length, width)).astype(np.float32)
            for one in language["inputs"]
        }
        assert run(folder, language, values)["last_hidden_state"].shape == (rows, length, width)
    assert (
        "graftc.certificate" in ort.InferenceSession(str(folder / "lm_head.onnx")).get_modelmeta().custom_metadata_map
    )


@pytest.mark.full
def test_only_such_a_folder_is_replaced(written: tuple[Any, Any, Path], tmp_path: Path) -> None:
    merged, inputs, folder = written
    with pytest.raises(graftc.GraftError, match="GC063"):
        merged.export_components(folder, inputs)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(graftc.GraftError, match="GC063"):
        merged.export_components(other, inputs, force=True)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]
    with pytest.raises(graftc.GraftError, match="GC060: LlavaForConditionalGeneration does not run"):
        merged.export_components(tmp_path / "none", {**inputs, "pixel_values": torch.zeros(1, 3, 8, 8)})
    assert not (tmp_path / "none").exists()


@pytest.mark.full
def test_a_model_with_one_stack_has_no_components(tmp_path: Path) -> None:
    compiled = graftc.compile(SPEC, families.llama(), cache=False).eval()
    merged = compiled.merge(allow_unchanged=True)
    with pytest.raises(graftc.GraftError, match="GC060: LlamaForCausalLM has one stack of layers"):
        merged.export_components(tmp_path / "out", {"input_ids": torch.ones(2, 5, dtype=torch.long)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.full
def test_one_row_is_enough_for_any_number_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = families.t5()
    compiled = graftc.compile(
        {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.q"}}]}, model, cache=False
    )
    ids = torch.randint(3, 40, (1, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}
    compiled.eval().merge(allow_unchanged=True).export_components(tmp_path / "out", batch)
    manifest = json.loads((tmp_path / "out" / "components.json").read_text(encoding="utf-8"))
    assert {"encoder", "decoder"} <= {entry["module"] for entry in manifest["components"]}
    shapes = [one["shape"] for entry in manifest["components"] for one in entry["inputs"]]
    assert shapes and all(isinstance(shape[0], str) for shape in shapes)


@pytest.mark.full
def test_what_no_graph_takes_is_left_out_with_the_reason(tmp_path: Path) -> None:
    """The vision blocks of Qwen2-VL read lengths: they are left out, and its language model is a file."""
    small = qwen2_vl()
    torch.manual_seed(0)
    compiled = graftc.compile(SPEC, small.model, small.first, cache=False).eval()
    perturb(compiled)
    compiled.merge().export_components(tmp_path / "out", small.first)
    manifest = json.loads((tmp_path / "out" / "components.json").read_text(encoding="utf-8"))
    assert "model.language_model" in {entry["module"] for entry in manifest["components"]}
    (left,) = manifest["left_out"]
    assert left["module"] == "model.visual" and "segment lengths" in left["reason"] and "graftc" not in left["reason"]
    files = {entry["file"] for entry in manifest["components"]}
    assert {path.name for path in (tmp_path / "out").glob("*.onnx")} == files
