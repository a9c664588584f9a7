"""The share of a LoRA update that is left after a merge in bfloat16, by learning rate and alpha over rank.

    python -m benchmarks.retention [--steps 50] [--layers 30] [--out benchmarks/results]

SmolLM2-135M-Instruct (`graftc.applications.demo.decoder`) with weights rounded to bfloat16 is adapted with LoRA of rank
8 at all seven projections, and trained on Reuters R8 with AdamW at a constant learning rate, with one text of 32 tokens
per step. It is trained in float32; the folded weights are then rounded to bfloat16. The table has the retention of all
sites together, as in the certificate of a merge.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import graftc
from graftc.applications.demo.data import find_data, read_tab
from graftc.applications.demo.decoder import find_decoder, load_decoder
from graftc.compiler.folding.fold_plan import fold_plan
from graftc.compiler.folding.rounding import retained, round_pieces
from graftc.records.retention import Retention

RATES = (1e-5, 1e-4, 1e-3)
SCALES = (1, 2, 16)
RANK, TOKENS = 8, 32
ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]


def texts() -> list[str]:
    """Return the texts of the training split."""
    file = next(path for path in sorted(find_data().glob("*r8*train*")))
    return [text for text, _ in read_tab(file)]


def batches(steps: int) -> Iterator[torch.Tensor]:
    """Yield one text of `TOKENS` tokens at a time, ``int64[1, TOKENS]``; they are the same in every run."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(find_decoder())
    tokens: list[int] = []
    for text in texts():
        tokens += tokenizer(text)["input_ids"]
        if len(tokens) >= steps * TOKENS:
            break
    for step in range(steps):
        yield torch.tensor([tokens[step * TOKENS : (step + 1) * TOKENS]])


def adapted(layers: int, scale: int) -> Any:
    """Return the decoder with its adapters, before training."""
    model = load_decoder(layers).requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    spec = {"adapt": [{"method": "lora", "rank": RANK, "alpha": RANK * scale, "target": {"role": ROLES}}]}
    return graftc.compile(spec, model).train()


def run(compiled: Any, rate: float, scale: int, data: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Train once, and measure the retention."""
    started = time.perf_counter()
    optimiser = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    losses: list[float] = []
    for ids in data:
        loss = compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    total, update, base = Retention(), 0.0, 0.0
    lazy = fold_plan(compiled.compilation).lazy
    with torch.no_grad():
        for group in lazy.groups():
            for name, exact in lazy.fold(group).items():
                original = lazy.store.full(name)
                rounded = torch.empty(exact.shape, dtype=torch.bfloat16)
                round_pieces(rounded, exact)
                total += retained(original, exact, rounded)
                update, base = (
                    update + float((exact - original).square().sum()),
                    base + float(original.double().square().sum()),
                )
    return {
        **{"rate": rate, "scale": scale, **(total.to_json() or {}), "relative_update": math.sqrt(update / base)},
        **{"first_loss": sum(losses[:5]) / 5, "last_loss": sum(losses[-5:]) / 5},
        "seconds": time.perf_counter() - started,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the results in Markdown."""
    lines = [
        "| learning rate | alpha / rank | update over base | retained (norm) | changed entries | error |",
        *("| --- " * 6 + "|",),
    ]
    for row in rows:
        lines.append(
            f"| {row['rate']:.0e} | {row['scale']} | {row['relative_update']:.1e} | {100 * row['norm']:.1f} % | "
            f"{100 * row['entries']:.1f} % | {row['error']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run all settings, print the table, and write it with the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--layers", type=int, default=30, help="the first ones only")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = list(batches(options.steps))
    rows: list[dict[str, Any]] = []
    for scale in SCALES:
        compiled = adapted(options.layers, scale)
        untrained = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
        for rate in RATES:
            compiled.load_adapter_state_dict(untrained)
            rows.append(run(compiled, rate, scale, data))
            print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: (row["rate"], row["scale"]))
    text = table(rows)
    print(text)
    settings = {"model": "SmolLM2-135M-Instruct", "layers": options.layers, "steps": options.steps, "rank": RANK}
    content = json.dumps({**settings, "runs": rows}, indent=1)
    (options.out / "retention.json").write_text(f"{content}\n", encoding="utf-8")
    head = (
        f"# Retention in bfloat16\n\nSmolLM2-135M-Instruct, {options.layers} layers, LoRA of rank {RANK} at all seven "
        f"projections, {options.steps} steps of AdamW: `python -m benchmarks.retention --layers {options.layers}`.\n\n"
    )
    (options.out / "retention.md").write_text(f"{head}{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
