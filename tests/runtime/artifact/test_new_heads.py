"""A head that the checkpoint lacks is new in every process; if it is trained in full, any initial value will do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

import graftc
from graftc.runtime.artifact import open_artifact
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.models import adapted
from tests.runtime.artifact.support import edit_manifest

pytestmark = pytest.mark.slow

SPEC = {"adapt": [{"method": "lora", "target": {"role": ["attn.q"]}}], "train": ["classifier"]}
ALONE = {"adapt": [{"method": "lora", "target": {"role": ["attn.q"]}}]}
IDS = {"input_ids": torch.arange(1, 13).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an encoder without a head."""
    folder = tmp_path_factory.mktemp("base") / "encoder"
    model: Any = tiny("bert").bert
    BertModel(model.config).save_pretrained(folder)
    return folder


def with_head(encoder: Path, seed: int, **options: Any) -> nn.Module:
    """Return the encoder with a randomly initialised head."""
    torch.manual_seed(seed)
    model: nn.Module = BertForSequenceClassification.from_pretrained(encoder, num_labels=5, **options)
    return model.eval()


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def written(request: Any, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, torch.dtype]:
    """A folder with an artifact and a checkpoint, the model's outputs, and its dtype."""
    folder = tmp_path_factory.mktemp("written")
    compiled = adapted(with_head(encoder, 1, dtype=request.param), **SPEC)
    compiled.save(folder / "artifact")
    (folder / "checkpoint").mkdir()
    save_file({n: t.contiguous() for n, t in compiled.state_dict().items()}, folder / "checkpoint/model.safetensors")
    return folder, compiled(**IDS).logits, request.param


@pytest.mark.full
@pytest.mark.parametrize("form", ["artifact", "checkpoint"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
def test_loads(form: str, given: bool, encoder: Path, written: tuple[Path, Tensor, torch.dtype]) -> None:
    """It loads over the base of another process and by the folder alone, with the same class, labels and dtype."""
    folder, expected, dtype = written
    loaded = graftc.load(folder / form, with_head(encoder, 2, dtype=dtype) if given else None).eval()
    assert torch.equal(loaded(**IDS).logits, expected)
    assert type(loaded.compilation.source) is BertForSequenceClassification


@pytest.mark.full
def test_state_dict_loads(encoder: Path, written: tuple[Path, Tensor, torch.dtype]) -> None:
    """The state loads into a model that was compiled with another random head."""
    folder, expected, dtype = written
    compiled = graftc.compile(SPEC, with_head(encoder, 3, dtype=dtype)).eval()
    compiled.load_state_dict(graftc.load(folder / "artifact").state_dict())
    assert torch.equal(compiled(**IDS).logits, expected)


@pytest.mark.full
def test_verifies(written: tuple[Path, Tensor, torch.dtype]) -> None:
    """The artifact verifies, with the certificate's fingerprint, which also leaves the head out."""
    assert all(check.passed for check in verify(written[0] / "artifact").checks)


@pytest.mark.full
@pytest.mark.parametrize("form", ["artifact", "checkpoint"])
def test_the_rest_of_the_base_counts(
    form: str, encoder: Path, written: tuple[Path, Tensor, torch.dtype], tmp_path: Path
) -> None:
    """Another encoder is another base, and so is another number of labels."""
    folder, _, dtype = written
    other: Any = with_head(encoder, 1, dtype=dtype)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.add_(1)
    torch.manual_seed(1)
    fewer = BertForSequenceClassification.from_pretrained(encoder, num_labels=4, dtype=dtype)
    for base in (other, fewer):
        with pytest.raises(GraftError) as caught:
            graftc.load(folder / form, base)
        assert caught.value.code == "GC087"


@pytest.mark.full
def test_a_head_that_does_not_train_counts(encoder: Path, tmp_path: Path) -> None:
    """An untrained head's values belong to the base, which then has to be given."""
    artifact = adapted(with_head(encoder, 1), **ALONE).save(tmp_path / "artifact")
    graftc.load(artifact, with_head(encoder, 1))
    with pytest.raises(GraftError, match=r"classifier\.\w+ has different values"):
        graftc.load(artifact, with_head(encoder, 2))
    with pytest.raises(GraftError) as caught:
        graftc.load(artifact)
    assert caught.value.code == "GC089"


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["os.getcwd", "a.PreTrainedModel", "a.GPT2LMHeadModel", "a.no_class", "a.x\u202ey", ""]
)
def test_a_class_is_a_name(name: str, encoder: Path, tmp_path: Path) -> None:
    """A name that is not a transformers class for this config is not looked up anywhere else."""
    artifact = Path(adapted(with_head(encoder, 1), **SPEC).save(tmp_path / "artifact"))
    edit_manifest(artifact, base=lambda base: {**base, "model": name})
    with pytest.raises(GraftError) as caught:
        graftc.load(artifact)
    assert caught.value.code in ("GC082", "GC087")


@pytest.mark.full
def test_tied_tensors_count(tmp_path: Path) -> None:
    """If one of two names of a tensor is untied and trained, the other one's values still identify the base."""
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q"]}}], "train": ["lm_head"], "untie": ["lm_head"]}
    model: Any = tiny("gpt2")
    assert open_artifact(adapted(model, **spec).save(tmp_path / "artifact")).replaced == frozenset()
    with torch.no_grad():
        model.transformer.wte.weight.add_(1)
    with pytest.raises(GraftError, match="has different values"):
        graftc.load(tmp_path / "artifact", model)


CHANGES: dict[str, dict[str, Any]] = {
    "dropout": {"hidden_dropout_prob": 0.3},
    "layers": {"num_hidden_layers": 1},
    "labels": {"id2label": dict(enumerate("abcde")), "label2id": {c: i for i, c in enumerate("abcde")}},
    "epsilon": {"layer_norm_eps": 1e-3},
}


@pytest.mark.full
@pytest.mark.parametrize("form", ["artifact", "checkpoint"])
@pytest.mark.parametrize("how", ["found", "folder", "moved"])
@pytest.mark.parametrize("change", CHANGES)
def test_the_base_is_built_as_it_was(form: str, how: str, change: str, encoder: Path, tmp_path: Path) -> None:
    """The base is built from its folder, given or found, or from a copy of it."""
    torch.manual_seed(1)
    options = {} if change == "labels" else {"num_labels": 5}
    model: Any = BertForSequenceClassification.from_pretrained(encoder, **options, **CHANGES[change])
    compiled = adapted(model.eval(), **SPEC)
    compiled.save(tmp_path / "artifact")
    (tmp_path / "checkpoint").mkdir()
    save_file({n: t.contiguous() for n, t in compiled.state_dict().items()}, tmp_path / "checkpoint/model.safetensors")
    shutil.copytree(encoder, tmp_path / "moved")
    base = {"found": None, "folder": str(encoder), "moved": str(tmp_path / "moved")}[how]
    loaded = graftc.load(tmp_path / form, base).eval()
    assert torch.equal(loaded(**IDS).logits, compiled(**IDS).logits)


@pytest.mark.full
@pytest.mark.parametrize("form", ["artifact", "checkpoint"])
def test_another_config_is_told_by_its_fields(
    form: str, encoder: Path, written: tuple[Path, Tensor, torch.dtype]
) -> None:
    folder, _, dtype = written
    with pytest.raises(GraftError, match=r"its config has hidden_dropout_prob 0\.4, not 0\.1") as caught:
        graftc.load(folder / form, with_head(encoder, 1, dtype=dtype, hidden_dropout_prob=0.4))
    assert caught.value.code == "GC087"


@pytest.mark.full
def test_a_model_that_ran_with_labels_is_the_same_base(encoder: Path, tmp_path: Path) -> None:
    """A transformers forward may write to its config, which does not change the base."""
    used: Any = with_head(encoder, 1)
    used(**IDS, labels=torch.zeros(2, dtype=torch.long))
    assert used.config.problem_type is not None
    artifact = adapted(used, **SPEC).save(tmp_path / "used")
    graftc.load(artifact, with_head(encoder, 2))
    graftc.load(adapted(with_head(encoder, 2), **SPEC).save(tmp_path / "fresh"), used)


SETTINGS: dict[str, dict[str, Any]] = {
    "larger": {"num_hidden_layers": 10**6, "hidden_size": 2**40, "vocab_size": 2**40},
    "words": {"hidden_act": "os.system", "model_type": "payload", "attn_implementation": "org/kernel"},
    "unknown": {"auto_map": "payload", "trust_remote_code": True, "forward": 1},
    "other kinds": {"num_hidden_layers": 1.0, "hidden_dropout_prob": 1, "is_decoder": 1},
}


@pytest.mark.full
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_file_neither_grow_a_model_nor_name_anything(name: str, encoder: Path, tmp_path: Path) -> None:
    artifact = Path(adapted(with_head(encoder, 1), **SPEC).save(tmp_path / "artifact"))
    edit_manifest(artifact, base=lambda base: {**base, "settings": {**base["settings"], **SETTINGS[name]}})
    source: Any = graftc.load(artifact).compilation.source
    fields, given = vars(source.config), SETTINGS[name]
    assert not any(fields.get(key) == value and type(fields.get(key)) is type(value) for key, value in given.items())
    assert len(source.bert.encoder.layer) == 2


@pytest.mark.sample("settings0", "settings2")
@pytest.mark.parametrize("settings", [{"num_hidden_layers": -1}, {"num_attention_heads": 3}, {"hidden_size": 7}])
def test_settings_that_make_no_model(settings: dict[str, Any], encoder: Path, tmp_path: Path) -> None:
    artifact = Path(adapted(with_head(encoder, 1), **SPEC).save(tmp_path / "artifact"))
    edit_manifest(artifact, base=lambda base: {**base, "settings": {**base["settings"], **settings}})
    with pytest.raises(GraftError) as caught:
        graftc.load(artifact)
    assert caught.value.code in ("GC032", "GC087", "GC089")


@pytest.mark.full
def test_another_head_is_told(encoder: Path, tmp_path: Path) -> None:
    """The error names what the folder's base lacks, apart from the checkpoint's own gaps."""
    model: Any = with_head(encoder, 1)
    model.classifier = nn.Sequential(nn.Linear(model.config.hidden_size, 4), nn.Linear(4, 5))
    artifact = adapted(model, **SPEC).save(tmp_path / "artifact")
    with pytest.raises(GraftError, match=r"it has no classifier\.0\.weight") as caught:
        graftc.load(artifact)
    assert caught.value.code == "GC087"
