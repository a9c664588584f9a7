"""Accuracy from few labels: a classifier trained on them alone, PET, iPET and LoRA-PET.

    python -m benchmarks.pet [--labels 0 10 50 100] [--seeds 0 1 2] [--out benchmarks/results]

The data are six groups of 20 Newsgroups (`benchmarks.pet_data`), the model is MiniLM with a masked-language-modelling
head (`benchmarks.masked_minilm`). All four methods start from that model and have the same labelled texts. Without
labels, nothing trains in PET's members, so LoRA-PET equals PET. A run is a line of ``pet-runs.jsonl``, which is read
first: a run that it contains with the same numbers of steps is not repeated. Writes pet.json and pet.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import graftc
from benchmarks.command import RESULTS, command_line, write
from benchmarks.masked_minilm import find_masked_minilm
from benchmarks.pet_data import Few, few
from graftc.applications.pet.classifier import sequence_classifier
from graftc.applications.pet.data import PetData, TextRows
from graftc.applications.pet.plain import PlainEncoder
from graftc.applications.pet.training import draws, logits_of

LABELS, SEEDS = (0, 10, 50, 100), (0, 1, 2)
UNLABELLED = TEST = 150
TOKENS, STEPS, DISTILLING = 32, 60, 200
PATTERNS = ["{text} This text is about {blank}.", "Topic: {blank}. {text}", "A discussion of {blank}: {text}"]
LORA = {"method": "lora", "rank": 8, "target": {"role": ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"]}}
METHODS: dict[str, dict[str, Any]] = {
    "supervised": {},
    "PET": {},
    "iPET": {"ipet": {"generations": 2}},
    "LoRA-PET": {"spec": {"adapt": [LORA]}, "members": "bank", "training": {"learning_rate": 1e-3}},
}


def document(method: str, names: Sequence[str]) -> dict[str, Any]:
    """Return the document of a method."""
    changes = METHODS[method]
    steps = {"steps": STEPS, "learning_rate": 1e-4, "max_length": TOKENS, "auxiliary": 0.0}
    distilling = {"steps": DISTILLING, "batch_size": 8, "learning_rate": 1e-4, "max_length": TOKENS}
    return {
        "patterns": PATTERNS,
        "verbalizer": {name: name for name in names},
        "seeds": 1,
        **changes,
        "training": {**steps, **changes.get("training", {})},
        "classifier": {"training": distilling},
    }


def task_of(labels: int, seed: int) -> Few:
    """Return the task with `labels` labelled texts in total, spread evenly over the classes as far as they allow.

    Test and unlabelled texts are the same for every number.
    """
    task = few("newsgroups", -(-max(LABELS) // 6), UNLABELLED, TEST, seed)
    rows = [[i for i, own in enumerate(task.labelled.labels) if own == label] for label in range(len(task.names))]
    turns = [own[turn] for turn in range(max(map(len, rows))) for own in rows if turn < len(own)][:labels]
    labelled = task.labelled
    some = type(labelled)(tuple(labelled.texts[i] for i in turns), tuple(labelled.labels[i] for i in turns))
    return Few(task.names, some, task.unlabelled, task.test)


def _rows(texts: Sequence[str], labels: Sequence[int] | None = None) -> TextRows | None:
    fields = tuple({"text": text} for text in texts)
    return TextRows(fields, None if labels is None else tuple(labels)) if fields else None


def supervised(model: Any, tokenizer: Any, task: Few, seed: int) -> float:
    """Return the accuracy of the final classifier's model and steps, trained on the labelled texts alone."""
    base = sequence_classifier(model, task.names, tokenizer.pad_token_id, seed)
    compiled = graftc.compile({"adapt": [{"method": "full"}]}, base, seed=seed).train()
    encoder = PlainEncoder(["text"], tokenizer, TOKENS)
    optimiser = torch.optim.AdamW(compiled.parameters(), lr=1e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, DISTILLING)
    answers, torch_seed = torch.tensor(task.labelled.labels), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    for _, some in zip(range(DISTILLING), draws(len(answers), 8, torch_seed), strict=False):
        inputs = encoder.encode([{"text": task.labelled.texts[i]} for i in some])
        cross_entropy(compiled(**inputs).logits, answers[some]).backward()
        torch.nn.utils.clip_grad_norm_(compiled.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    every = [list(range(first, min(first + 64, len(task.test)))) for first in range(0, len(task.test), 64)]
    batches = ((some, encoder.encode([{"text": task.test.texts[i]} for i in some])) for some in every)
    predicted = logits_of(compiled, batches, len(task.test)).argmax(1)
    return float((predicted == torch.tensor(task.test.labels)).float().mean())


def run(method: str, labels: int, seed: int, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return the accuracies of a run on the test set."""
    task, started = task_of(labels, seed), time.perf_counter()
    record: dict[str, Any] = {"method": method, "labels": labels, "seed": seed, "steps": [STEPS, DISTILLING]}
    if method == "supervised":
        record["classifier"] = supervised(model, tokenizer, task, seed) if labels else 1 / len(task.names)
    else:
        known = _rows(task.labelled.texts, task.labelled.labels)
        data = PetData(known, _rows(task.unlabelled), _rows(task.test.texts, task.test.labels))
        with tempfile.TemporaryDirectory() as folder:
            result = graftc.pet(document(method, task.names), model, tokenizer, data, folder=folder, seed=seed)
        record["untrained"] = [member.untrained["test"] for member in result.members]
        record["members"] = [member.trained["test"] for member in result.members]
        record |= {"ensemble": result.ensemble["test"], "classifier": result.final["test"]}
    return {**record, "seconds": time.perf_counter() - started}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the tables."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    prog = "python -m benchmarks.pet"
    parser = argparse.ArgumentParser(prog=prog, description="Accuracy from few labels.")
    parser.add_argument("--labels", nargs="+", type=int, default=LABELS, help="labelled texts in all")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="where files are written")
    options = parser.parse_args(arguments)
    folder = find_masked_minilm()
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    log = options.out / "pet-runs.jsonl"
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    runs = [each for each in map(json.loads, lines) if each["steps"] == [STEPS, DISTILLING]]
    done = {(each["method"], each["labels"], each["seed"]) for each in runs}
    for seed in options.seeds:
        for labels in options.labels:
            for method in options.methods:
                if (method, labels, seed) in done or (method == "LoRA-PET" and not labels):
                    continue
                record = run(method, labels, seed, model, tokenizer)
                print(json.dumps(record), file=sys.stderr)
                runs.append(record)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    data = _data(prog, arguments, runs)
    write(options.out, "pet", data, "\n".join(_lines(data)) + "\n")
    return 0


def _data(prog: str, arguments: Sequence[str] | None, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "command": command_line(prog, arguments),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": list(runs),
    }


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    yield "# Accuracy from few labels"
    yield ""
    yield f"Made by `{data['command']}` on {data['date']}; [how to read it](../README.md)."
    yield ""
    yield (
        f"Six groups of 20 Newsgroups, {UNLABELLED} unlabelled and {TEST} test texts of up to {TOKENS} tokens; MiniLM "
        f"with a head trained on the training texts of that corpus and of Reuters; {len(PATTERNS)} patterns, a member "
        f"each, {STEPS} steps of 4 texts; classifiers of {DISTILLING} steps of 8. Percent of the test texts, mean and "
        "range of seeds; ensembles in parentheses. iPET has two generations after the first."
    )
    yield ""
    runs = data["runs"]
    counts = sorted({each["labels"] for each in runs})
    yield "| | " + " | ".join(f"{count} labels" for count in counts) + " |"
    yield "| --- |" + " ---: |" * len(counts)
    zero = [each["untrained"] for each in runs if each["method"] == "PET"]
    patterns = [accuracy for own in zero for accuracy in own]
    for method in METHODS:
        cells = [[each for each in runs if each["method"] == method and each["labels"] == n] for n in counts]
        yield f"| {method} | " + " | ".join(map(_cell, cells)) + " |"
    yield ""
    if patterns:
        mean = 100 * statistics.mean(patterns)
        yield f"Untrained patterns alone: {mean:.1f} ({100 * min(patterns):.1f} to {100 * max(patterns):.1f})."


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return ""
    own = [100 * each["classifier"] for each in runs]
    text = f"{statistics.mean(own):.1f}"
    if max(own) > min(own):
        text += f" [{min(own):.1f}, {max(own):.1f}]"
    if len(own) < len(SEEDS):
        text += f", {len(own)} seed{'s' if len(own) > 1 else ''}"
    if all("ensemble" in each for each in runs):
        text += f" ({100 * statistics.mean(each['ensemble'] for each in runs):.1f})"
    return text


if __name__ == "__main__":
    sys.exit(main())
