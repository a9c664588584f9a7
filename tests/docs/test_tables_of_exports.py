"""Tables of pages about exports agree with the tables in the code."""

from __future__ import annotations

from graftc.runtime.export.registry import exporters
from graftc.runtime.serving.engines import ENGINES, FORMS, PEFT_ENGINES
from tests.kit.places import ROOT

NEVER = ("use_dora", "bias", "trainable_token_indices", "target_parameters")
DOCS = ROOT / "docs"


def rows_of(page: str, first: str) -> dict[str, list[str]]:
    """Return the rows of the table whose head begins with ``first``, by their first cell."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(first))
    rows: dict[str, list[str]] = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows[name] = cells
    return rows


def test_servers() -> None:
    rows, servers = rows_of("convert.md", "| | vLLM"), [ENGINES[name] for name in PEFT_ENGINES]
    assert rows[""] == [server.read for server in servers]
    assert rows["`--for`"] == [f"`{server.name}`" for server in servers]
    for row, server in zip(rows["largest rank"], servers, strict=True):
        known = list(map(str, server.ranks))
        above = "" if server.default_rank is None else f"; above {server.default_rank} with `{server.option}`"
        assert row == (f"{', '.join(known[:-1])} or {known[-1]}" if known else f"any{above}")
    for column, server in enumerate(servers):
        for field in ("use_rslora", "rank_pattern", "alpha_pattern", *NEVER):
            cell = next(cells[column] for name, cells in rows.items() if f"`{field}`" in name)
            assert cell == ("refused" if field in server.refused else "read")
        saved = ", ".join(f"`{name}`" for name in server.saved) or "refused"
        assert rows["`modules_to_save`"][column] == saved


def test_what_engines_do_with_fields() -> None:
    rows = rows_of("serving.md", "| field | ")
    assert rows["field"] == [f"`{name}`" for name in PEFT_ENGINES]
    fields = {
        field: [ENGINES[name].fields[field].treatment for name in PEFT_ENGINES] for field in ENGINES["vllm"].fields
    }
    assert {field: rows[f"`{field}`"] for field in fields} == fields


def test_engines() -> None:
    rows = rows_of("serving.md", "| `--engine` | ")
    own = {
        f"`{name}`": [engine.read, engine.read_on, ", ".join(FORMS[form].split(" ", 1)[1] for form in engine.forms)]
        for name, engine in ENGINES.items()
    }
    assert {name: rows[name] for name in own} == own


def test_options_of_formats() -> None:
    options: dict[str, list[str]] = {}
    for name, (cell,) in rows_of("exports.md", "| format | options |").items():
        for format in name.replace("`", "").split(", "):
            options[format] = [] if cell == "none" else cell.replace("`", "").split(", ")
    own = {name: [option.name for option in exporter.options] for name, exporter in exporters().items()}
    assert {name: options[name] for name in own} == own
