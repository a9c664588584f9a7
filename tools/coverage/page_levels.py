"""The part of the page on levels: how much of each class is a graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tools.coverage.catalogue import TABLES
from tools.coverage.cells import cell, percent

Record = Mapping[str, Any]
_MEDIUM = re.compile(r"pixel|image|features|values|patches")


def level_counts(records: Sequence[Record]) -> dict[str, int]:
    """Count the classes that were built by the level of their main stack."""
    built = [record for record in records if record["built"]]
    counts = Counter(record.get("level", "refused") for record in built)
    return {"built": len(built)} | {name: counts[name] for name in ("graph", "layers", "modules", "refused")}


def render_levels(records: Sequence[Record]) -> str:
    """Return the summary by table, the classes that are taken apart and why, and the refused ones."""
    parts = [_summary(records), _texts_alone(records), _apart(records), _refused(records)]
    return "\n".join(part for part in parts if part)


def _summary(records: Sequence[Record]) -> str:
    lines = [
        "## Levels",
        "",
        "With LoRA by role, or, where that does not compile and fold, with LoRA of rank 1 on every map that the",
        "example calls. A class counts where its main stack does: the one with most parameters at full size.",
        "",
        "| table | classes | built | graph | layers | modules | refused | layers or better |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = [(name, [r for r in records if name in r["tables"]]) for name in TABLES]
    for name, own in [*rows, ("all, each class once", list(records))]:
        c = level_counts(own)
        share = percent(c["graph"] + c["layers"], c["built"])
        lines.append(
            f"| {name} | {len(own)} | {c['built']} | {c['graph']} | {c['layers']} | {c['modules']} | {c['refused']} "
            f"| {share} |"
        )
    return "\n".join([*lines, ""])


def _texts_alone(records: Sequence[Record]) -> str:
    """List the models of pictures or sounds whose example is only a text."""
    tables = {"image-text to text", "multimodal LM"}
    names = [
        record["class"]
        for record in records
        if record["built"] and tables.intersection(record["tables"]) and not any(map(_MEDIUM.search, record["inputs"]))
    ]
    if not names:
        return ""
    return f"No picture or sound was found that these take; they were examined on texts: {', '.join(names)}.\n"


def _apart(records: Sequence[Record]) -> str:
    taken_apart = [r for r in records if r.get("level") in ("layers", "modules")]
    if not taken_apart:
        return ""
    lines = [
        "## Taken apart",
        "",
        "The main stack is in bold; a stack that the example does not call is left out.",
        "",
        "| class | graphs of layers | graphs of maps | why it is not one graph |",
        "| --- | --- | --- | --- |",
    ]
    for record in taken_apart:
        lines.append(
            f"| {record['class']} | {_stacks(record, 'layers')} | {_stacks(record, 'modules')} "
            f"| {cell(record.get('in_the_way') or record.get('reason', ''))} |"
        )
    return "\n".join([*lines, ""])


def _stacks(record: Record, level: str) -> str:
    stacks: Mapping[str, str] = record.get("stacks", {})
    names = (f"**{cell(s)}**" if s == record.get("main") else cell(s) for s in stacks if stacks[s] == level)
    return ", ".join(names)


def _refused(records: Sequence[Record]) -> str:
    refused = [r for r in records if r["built"] and not r.get("level")]
    lines = ["## Refused", ""]
    if not refused:
        return "\n".join([*lines, "None.", ""])
    lines += ["| class | reason |", "| --- | --- |"]
    return "\n".join(
        [*lines, *(f"| {r['class']} | {cell(r.get('refused', r.get('reason', '')))} |" for r in refused), ""]
    )
