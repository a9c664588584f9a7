"""Fold an adapted model and export it to ONNX, with inputs and outputs to compare with; run_onnx.py runs it.

python examples/export_onnx.py [OUT]        needs pip install 'graftc[export]'
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import graftc

SPEC = Path(__file__).parent / "specs" / "classifier.yaml"


def main(out: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, **sizes))
    compiled = graftc.compile(SPEC, base)

    batch = {"input_ids": torch.randint(3, 100, (24, 12)), "labels": torch.arange(24) % 3}
    batch["input_ids"][:, 5] = batch["labels"]
    optimiser = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(40):
        compiled.train()(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    out.mkdir(parents=True, exist_ok=True)
    merged = compiled.eval().merge()
    # Only the inputs of the deployed model: they include a mask, since its batches are padded.
    example = {"input_ids": batch["input_ids"], "attention_mask": torch.ones(24, 12, dtype=torch.long)}
    path = merged.export(out / "model.onnx", example_inputs=example)  # checked in ONNX Runtime before it returns

    # A different batch size and length, with some padding: both axes are dynamic.
    inputs = {"input_ids": torch.randint(3, 100, (3, 20)), "attention_mask": torch.ones(3, 20, dtype=torch.long)}
    inputs["input_ids"][:, 5] = torch.arange(3)
    inputs["attention_mask"][1, 15:] = 0
    with torch.no_grad():
        logits = merged(**inputs).logits
    np.savez(out / "example.npz", logits=logits.numpy(), **{name: tensor.numpy() for name, tensor in inputs.items()})
    print(f"wrote {path} and {out / 'example.npz'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "onnx-out"))
