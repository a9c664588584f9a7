"""Compile a spec against a model, train it, fold it, and save a plain transformers folder.

python examples/quickstart.py [OUT]
"""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import graftc

SPEC = {
    "adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}],
    "train": ["classifier"],
}


def main(out: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=2, **sizes))

    compiled = graftc.compile(SPEC, base)
    print(f"{compiled.report.trainable_parameters:,} adapter parameters, {compiled.report.percent:.2f} % of the model")
    print(compiled.diff())

    # The task: which of the tokens 0 and 1 is in the sequence?
    tokens, labels = torch.randint(2, 100, (256, 12)), torch.arange(256) % 2
    tokens[:, 5] = labels
    optimiser = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=1e-2)
    compiled.train()
    for step in range(81):
        chosen = torch.randint(0, 256, (32,))
        loss = compiled(input_ids=tokens[chosen], labels=labels[chosen]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    merged = compiled.eval().merge()  # raises if the certificate does not pass
    print(f"certified: folded and unfolded outputs differ by at most {merged.certificate.largest_difference:.1e}")
    merged.save(out, force=True)

    plain = BertForSequenceClassification.from_pretrained(out).eval()  # no graftc needed from here on
    with torch.no_grad():
        logits = plain(input_ids=tokens).logits
        print(f"accuracy of the folded model: {(logits.argmax(-1) == labels).float().mean().item():.2f}")
        torch.testing.assert_close(logits, compiled(input_ids=tokens).logits, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "quickstart-out"))
