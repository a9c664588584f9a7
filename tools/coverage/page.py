"""The committed list: docs/coverage.json, and docs/coverage.md, which is a pure function of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.coverage.catalogue import TABLES
from tools.coverage.cells import cell, percent
from tools.coverage.page_levels import level_counts, render_levels

COMMAND = "make coverage"
FIELDS = (
    "class", "model_type", "tables", "built", "inputs", "captured", "attention", "roles", "unresolved", "target",
    "sites", "folds", "rounding", "draws", "reason", "level", "main", "stacks", "in_the_way", "refused",
)  # fmt: skip
"""The fields that a record of the list may have, in their order."""
Record = Mapping[str, Any]


def to_json(records: Iterable[Record], versions: Mapping[str, str]) -> str:
    """Return the text of docs/coverage.json: versions, then one line per record, sorted by class.

    Args:
        records: the records, as `examine` returns them; fields that are not in `FIELDS` are left out.
        versions: the versions of the packages that the records depend on, by name.
    """
    kept = [{name: record[name] for name in FIELDS if name in record} for record in records]
    lines = [json.dumps(record, ensure_ascii=False) for record in sorted(kept, key=lambda r: r["class"])]
    header = json.dumps({"command": COMMAND, "versions": dict(sorted(versions.items()))})
    return f'{{"made": {header},\n"records": [\n' + ",\n".join(lines) + "\n]}\n"


def totals(records: Iterable[Record]) -> dict[str, int]:
    """Count the records by how far they came; ``exceptions`` are captured, have attention, and do not fold."""
    all_records = list(records)
    captured = [r for r in all_records if r.get("captured")]
    attention = [r for r in captured if r.get("attention")]
    return {
        "entries": len(all_records),
        "built": sum(r["built"] for r in all_records),
        "captured": len(captured),
        "complete": sum(bool(r.get("roles")) for r in captured),
        "attention": len(attention),
        "folds": sum(bool(r.get("folds")) for r in attention),
        "exceptions": len(exceptions(all_records)),
    }


def exceptions(records: Iterable[Record]) -> list[Record]:
    """Return records that were captured and have attention, but on which LoRA by role does not compile and fold."""
    return [r for r in records if r.get("captured") and r.get("attention") and not r.get("folds")]


def render(text: str) -> str:
    """Return the Markdown page for the text of docs/coverage.json."""
    data = json.loads(text)
    records: list[Record] = data["records"]
    parts = [_head(data["made"], records), render_levels(records), _totals(records), _exceptions(records)]
    parts += [
        _reasons("Not built", "No small model of these could be made here.", [r for r in records if not r["built"]])
    ]
    parts += [_table(name, [r for r in records if name in r["tables"] and r.get("captured")]) for name in TABLES]
    return "\n".join(part for part in parts if part)


def write_page(records: Iterable[Record], versions: Mapping[str, str], folder: Path) -> str:
    """Write both files, and return a line that summarises them."""
    text = to_json(records, versions)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "coverage.json").write_text(text, encoding="utf-8")
    (folder / "coverage.md").write_text(render(text), encoding="utf-8")
    count = totals(json.loads(text)["records"])
    return f"{folder / 'coverage.md'}: " + ", ".join(f"{number} {name}" for name, number in count.items())


def _head(made: Mapping[str, Any], records: Sequence[Record]) -> str:
    count, reached = totals(records), level_counts(records)
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return f"""# Coverage

Classes in the auto tables of the installed transformers, made small and random from their default configs by the rules
of `tools/coverage`, and models of diffusers, timm and torchvision. Of the {count["built"]} that could be built,
{reached["graph"]} are one graph, {reached["layers"]} more are graphs of their layers on the main stack
({percent(reached["graph"] + reached["layers"], reached["built"])} together), {reached["modules"]} are graphs of single
maps there, and {reached["refused"]} are refused. Of the {count["attention"]} that contain attention, in one graph or in
several, {count["folds"]} take LoRA by role and fold ({percent(count["folds"], count["attention"])}).

Made by `{made["command"]}` with {versions}.
This page is generated from `coverage.json`; do not edit it.

- **attention**: the roles hold an attention; `softmax` means that only a softmax in the graph speaks for one.
- **roles**: `complete` when every linear map of the layers has a role, and every attention its q, k and v.
- **LoRA on**: those of `attn.q`, `attn.v`, `ffn.down`, `experts` that the model has, rank 2
  (`mixer` too where it has no attention).
- **folds**: compiled, the base's outputs to the bit before training, then with perturbed adapters merged and
  certified.
"""


def _totals(records: Sequence[Record]) -> str:
    lines = [
        "## LoRA by role",
        "",
        "| table | classes | built | captured, whole or in parts | with attention | of these fold | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = [(name, [r for r in records if name in r["tables"]]) for name in TABLES]
    for name, own in [*rows, ("all, each class once", list(records))]:
        c = totals(own)
        share = percent(c["folds"], c["attention"])
        lines.append(
            f"| {name} | {c['entries']} | {c['built']} | {c['captured']} | {c['attention']} | {c['folds']} | {share} |"
        )
    return "\n".join(lines) + "\n"


def _exceptions(records: Sequence[Record]) -> str:
    lines = ["## Exceptions", "", "Captured, with attention, and LoRA by role does not compile and fold.", ""]
    failures = exceptions(records)
    if not failures:
        return "\n".join([*lines[:2], "None.", ""])
    lines += ["| class | reason |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {r['class']} | {cell(r['reason'])} |" for r in failures), ""])


def _reasons(title: str, text: str, records: Sequence[Record]) -> str:
    if not records:
        return ""
    grouped: dict[str, list[str]] = {}
    for record in records:
        grouped.setdefault(record["reason"].replace(record["class"], "it"), []).append(record["class"])
    lines = [f"- {', '.join(names)}: {cell(reason)}" for reason, names in grouped.items()]
    return "\n".join([f"## {title}", "", text, "", *lines, ""])


def _table(name: str, records: Sequence[Record]) -> str:
    lines = [f"## {name[0].upper()}{name[1:]}", "", "| class | attention | roles | LoRA on | sites | folds |"]
    lines += ["| --- | --- | --- | --- | ---: | --- |"]
    return "\n".join([*lines, *(_row(record) for record in records), ""])


def _row(record: Record) -> str:
    attention = {"role": "yes", "softmax": "softmax", "": "none"}[record.get("attention", "")]
    roles = "complete" if record.get("roles") else cell(record.get("unresolved", "not read"))
    target = ", ".join(f"`{role}`" for role in record.get("target", [])) or "nothing"
    failed = f"no: {cell(record['reason'])}" if record.get("reason") else "no site"
    folds = "yes" if record.get("folds") else failed
    return f"| {record['class']} | {attention} | {roles} | {target} | {record.get('sites', '')} | {folds} |"
